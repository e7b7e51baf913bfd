"""How a network or a tokenizer that is not on this machine is fetched: the command, for errors that miss one."""

from __future__ import annotations

from pathlib import Path


def fetch_command(name: str) -> str:
    """The command that brings what transformers calls `name`, a model on the hub or the folder of one.

    >>> fetch_command("openai-community/gpt2"), fetch_command("../models/gpt2")
    ('hf download openai-community/gpt2', 'hf download gpt2 --local-dir ../models/gpt2')
    """
    path = Path(name)
    is_path = len(path.parts) > 2 or path.is_absolute() or name.startswith((".", "~"))
    is_folder = is_path or (len(path.parts) == 2 and path.parent.is_dir())
    return f"hf download {path.name} --local-dir {name}" if is_folder else f"hf download {name}"
