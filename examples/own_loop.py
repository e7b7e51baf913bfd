"""Your own model in your own loop: four lines make its hidden layers 1:8, then prove and shrink it.

Run it: python examples/own_loop.py [STEPS]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import nmflow

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)

images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
images = (images / 16).float()
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
sparsifier = nmflow.Sparsifier(
    model, targets={"0.weight": "1:8", "2.weight": "1:8"}, recipe="mdgf-exponential", total_steps=steps
)

for step in range(steps):
    batch = train[torch.randint(len(train), (64,))]
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    sparsifier.edit_gradients()  # SR-STE's term; nothing for other recipes
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    sparsifier.step()
    if step % 50 == 0:
        now = sparsifier.report()
        print(f"step {step:4}  loss {loss.item():.3f}  D {now.slots[0].decay:.3f}  density {now.density:.3f}")

report = sparsifier.finalize()
model.eval()
with torch.no_grad():
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
print(f"test accuracy {accuracy:.1%} at density {report.density:.3f}")

print("\n".join(nmflow.verify(model).lines()))
small = nmflow.compress(model)
print("\n".join(nmflow.runtime.compression_report(small).lines()))
with torch.no_grad():
    assert torch.allclose(small(images[test]), model(images[test]), atol=1e-5)
