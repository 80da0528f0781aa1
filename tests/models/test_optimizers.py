"""Optimizers without torch's compiler: the same bits as torch's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from mosaic_ray.models import optimizers

CASES = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}), ("SGD", {"lr": 0.1}), ("Adam", {"lr": 0.01}),
    ("LBFGS", {"max_iter": 5, "line_search_fn": "strong_wolfe"}),
]  # fmt: skip


@pytest.mark.parametrize("name, knobs", CASES)
def test_steps_are_torchs_bit_for_bit(name, knobs):
    torch.manual_seed(0)
    networks = [torch.nn.Linear(5, 3)]
    networks.append(copy.deepcopy(networks[0]))
    images = torch.randn(7, 5)
    for network, module in zip(networks, (optimizers, torch.optim), strict=True):
        optimizer = getattr(module, name)(network.parameters(), **knobs)

        def closure(network=network, optimizer=optimizer):
            optimizer.zero_grad()
            loss = network(images).square().mean()
            loss.backward()
            return loss

        for _ in range(4):
            if name == "LBFGS":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            assert torch.is_grad_enabled()
        assert not any(part.grad_fn for part in network.parameters())
        assert isinstance(optimizer, getattr(torch.optim, name))
    for ours, torchs in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(ours, torchs)


def test_gradients_are_set_to_none_and_states_are_kept_and_loaded():
    part = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizers.SGD([part], lr=0.1, momentum=0.9)
    part.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert part.grad is None
    again = optimizers.SGD([part], lr=0.5)
    again.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert again.param_groups[0]["lr"] == 0.1
    assert torch.equal(again.state[part]["momentum_buffer"], optimizer.state[part]["momentum_buffer"])
