"""Appendix B: the two groups, the update by hand, the schedule."""

import pytest
import torch
from test_models import bridge
from torch import nn

from bridge_wsol.config import resolve_config
from bridge_wsol.optim import build_optimizer, set_learning_rates


@pytest.mark.parametrize("arch, new_layers", [("vgg16", ("conv6.", "fc.")), ("resnet50", ("layer4.", "fc."))])
def test_every_parameter_is_in_exactly_one_group(arch, new_layers):
    method = bridge(arch)
    method.config.lr, method.config.lr_new = 0.1, 0.5
    optimizer = build_optimizer(method, method.config)
    names = {parameter: name for name, parameter in method.net.named_parameters()}
    old, new = ([names[parameter] for parameter in group["params"]] for group in optimizer.param_groups)
    assert sorted(old + new) == sorted(names.values())
    assert new == [name for name in names.values() if name.startswith(new_layers)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_a_parameter_outside_of_the_network_is_refused():
    method = bridge("vgg16")
    method.extra = nn.Linear(2, 2)  # a checkpoint, which holds the network, would lack it
    with pytest.raises(ValueError, match="extra.weight .*self.net"):
        build_optimizer(method, method.config)
    method.net.extra = method.extra
    del method.extra
    assert method.net.extra.weight in set(build_optimizer(method, method.config).param_groups[1]["params"])


def test_one_step_with_the_values_of_a_run_is_nesterov_sgd_by_hand():
    config, _ = resolve_config({"dataset": "CUB", "lr_new": 0.5})
    method = bridge("vgg16")
    optimizer, parameter = build_optimizer(method, config), method.net.fc.bias
    value, velocity = parameter.detach().clone().fill_(2.0), 0.0
    parameter.data.fill_(2.0)
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        gradient = 1.0 + 5e-4 * value
        velocity = 0.9 * velocity + gradient
        value -= 0.5 * (gradient + 0.9 * velocity)
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-6, atol=0)


def test_the_schedule_decays_from_the_named_epochs_on_and_has_no_memory():
    method = bridge("vgg16")
    method.config.lr, method.config.lr_new = 1.0, 5.0
    optimizer = build_optimizer(method, method.config)
    for epoch, factor in ((1, 1), (40, 1), (41, 0.2), (60, 0.2), (61, 0.04), (70, 0.04), (5, 1)):
        rates = set_learning_rates(optimizer, epoch, [41, 61], 0.2)
        assert rates == pytest.approx([factor, 5 * factor])
        assert rates == [group["lr"] for group in optimizer.param_groups]
