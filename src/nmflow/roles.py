"""Which part a weight plays in its network, told from its name alone: ff, q, k, v, o.

One table for torch, timm and transformers. It needs no model, so files can be asked by role as well. What the
table does not know has no role and stays dense until it is named.
"""

from __future__ import annotations

import re

ROLES = ("ff", "q", "k", "v", "o", "conv")
GROUPS: dict[str, tuple[str, ...]] = {"qk": ("q", "k"), "qkv": ("q", "k", "v")}

_ATTENTION = r"(?:.*[._])?(?:attn|attention|selfattention|self_attention|encdecattention|crossattention|self|mixer)"
_FF = r"(?:.*[._])?(?:mlp|ffn|ff|feed_forward|feedforward|densereludense|layer\.\d+\.mlp)"

# (roles, full match on the lower-case parameter name). The first match decides. Three roles: a fused projection
# whose rows are those three in equal parts. BLOOM's and GPT-NeoX's query_key_value interleave heads and are left
# out on purpose: their thirds are not Q, K and V.
_TABLE: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (roles, re.compile(form))
    for roles, form in (
        ((), r".*(?:cpb_mlp|\.se\.|relative_position|rel_pos).*"),
        ((), r"(?:classifier|classification_head)\..*"),  # some heads have an out_proj
        ((), r"(?:.*\.)?head\.(?:.+\.)?fc[12]\.weight"),  # and timm's CAFormer's is an MLP
        (("q", "k", "v"), r"(?:.*\.)?in_proj_weight"),
        (("q", "k", "v"), rf"{_ATTENTION}\.(?:qkv|wqkv|c_attn)\.weight"),
        (("q",), r"(?:.*\.)?(?:q_proj|q_lin|wq|to_q|q_attn|query|query_proj)\.weight|(?:.*\.)?q_proj_weight"),
        (("k",), r"(?:.*\.)?(?:k_proj|k_lin|wk|to_k|key|key_proj)\.weight|(?:.*\.)?k_proj_weight"),
        (("v",), r"(?:.*\.)?(?:v_proj|v_lin|wv|to_v|value|value_proj)\.weight|(?:.*\.)?v_proj_weight"),
        (("q",), rf"{_ATTENTION}\.q\.weight"),
        (("k",), rf"{_ATTENTION}\.k\.weight"),
        (("v",), rf"{_ATTENTION}\.v\.weight"),
        (("o",), rf"{_ATTENTION}\.(?:o|proj|c_proj|wo|dense|output\.dense|to_out\.0|to_out)\.weight"),
        (("o",), r"(?:.*\.)?(?:o_proj|out_proj|out_lin)\.weight"),
        (("ff",), rf"{_FF}\.(?:fc\d|fc1_[gx]|fc_in|fc_out|c_fc|c_proj|wi|wi_0|wi_1|wo|w1|w2|w3|w12|lin1|lin2)\.weight"),
        (("ff",), r".+\.(?:linear1|linear2|fc1|fc2|gate_proj|up_proj|down_proj|gate_up_proj)\.weight"),
        (("ff",), r"linear[12]\.weight"),
        (("ff",), rf"{_FF}\.(?:dense_h_to_4h|dense_4h_to_h)\.weight"),
        (("ff",), r".+\.albert_layers\.\d+\.(?:ffn|ffn_output)\.weight"),
        (("ff",), r".+\.(?:intermediate|output)\.dense\.weight"),
    )
)


def roles_of(parameter: str) -> tuple[str, ...]:
    """Roles of a parameter by its qualified name: none, one, or (q, k, v) for a fused projection.

    >>> roles_of("blocks.0.attn.qkv.weight"), roles_of("blocks.0.mlp.fc1.weight"), roles_of("head.weight")
    (('q', 'k', 'v'), ('ff',), ())
    >>> roles_of("encoder.layer.3.attention.output.dense.weight"), roles_of("encoder.layer.3.output.dense.weight")
    (('o',), ('ff',))
    >>> roles_of("classification_head.out_proj.weight"), roles_of("head.fc.fc1.weight")
    ((), ())
    """
    name = parameter.lower()
    for roles, form in _TABLE:
        if form.fullmatch(name):
            return roles
    return ()
