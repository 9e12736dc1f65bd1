"""What every test process does first."""

import torch

# torch.compile and FakeTensorMode pretend that there is a GPU. Autograd, at its first backward,
# starts a thread for each GPU, and tests that fork later could not train: so it looks now.
torch.ones((), requires_grad=True).backward()
