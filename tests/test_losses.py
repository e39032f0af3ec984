"""Each loss against its published closed form, values and gradients; and where IPO ends up."""

import math

import pytest
import torch

from bo2 import bo2_loss
from dpo import dpo_loss
from ipo import ipo_loss
from slic import slic_loss

BETA = 0.3


def setup():
    g = torch.Generator().manual_seed(0)
    logps = (-30 * torch.rand(2, 64, generator=g, dtype=torch.float64)).requires_grad_()
    ref = -30 * torch.rand(2, 64, generator=g, dtype=torch.float64)
    return logps, ref, (logps[0] - ref[0]) - (logps[1] - ref[1])


FORMS = {  # as in TRL, Mitchell's DPO and the paper
    "dpo": (lambda lp, ref: dpo_loss(lp, ref, BETA),
            lambda h, lp: -torch.nn.functional.logsigmoid(BETA * h)),
    "ipo": (lambda lp, ref: ipo_loss(lp, ref, BETA),
            lambda h, lp: BETA**2 * (h - 1 / (2 * BETA)) ** 2),
    "slic": (lambda lp, ref: slic_loss(lp, ref, BETA), lambda h, lp: torch.relu(1 - BETA * h)),
    "slic-hf": (lambda lp, ref: slic_loss(lp, 0 * ref, BETA, sft_weight=0.5),
                lambda h, lp: (1 - BETA * (lp[0] - lp[1])).clamp(min=0) - 0.5 * lp[0]),
    "bo2": (lambda lp, ref: bo2_loss(lp, ref), lambda h, lp: -lp[0]),
}


@pytest.mark.parametrize("name", FORMS)
def test_equals_the_closed_form(name):
    loss, form = FORMS[name]
    logps, ref, h = setup()
    assert torch.allclose(loss(logps, ref), form(h, logps), atol=1e-12)
    (ours,) = torch.autograd.grad(loss(logps, ref).sum(), logps, retain_graph=True)
    (theirs,) = torch.autograd.grad(form(h, logps).sum(), logps)
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_gradient_by_finite_differences(name):
    logps, ref, _ = setup()
    assert torch.autograd.gradcheck(lambda lp: FORMS[name][0](lp, ref[:, :4]), logps[:, :4].detach()
                                    .requires_grad_())


@pytest.mark.parametrize("form", ["ipo", "slic", "dpo"])
def test_where_a_loss_pulls(form):
    """IPO back from beyond h = 1/(2 beta), SLiC not at all beyond 1/beta, DPO ever further."""
    h = torch.tensor([-1.0, 0.0, 0.9, 1.1, 1.9, 2.1, 9.0]) / (2 * BETA)
    logps = torch.stack([h - 7, torch.full_like(h, -7)]).requires_grad_()
    FORMS[form][0](logps, torch.zeros_like(logps)).sum().backward()
    pull = -logps.grad  # where a step goes
    assert torch.equal(pull[0], -pull[1])
    assert pull[0].sign().tolist() == {"ipo": [1, 1, 1, -1, -1, -1, -1], "dpo": [1] * 7,
                                       "slic": [1, 1, 1, 1, 1, 0, 0]}[form]


def test_values_by_hand():
    zero, one = torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
    assert dpo_loss(zero, zero, 0.1).item() == pytest.approx(math.log(2))
    assert dpo_loss(one, zero, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert ipo_loss(zero, zero, 0.1).item() == pytest.approx(0.25)
    assert ipo_loss(one, zero, 1.0).item() == pytest.approx(0.25)
    assert ipo_loss(one, zero, 0.5).item() == pytest.approx(0.0)
    assert slic_loss(one, zero, 0.25).item() == pytest.approx(0.75)
    assert bo2_loss(-3 * one, None).item() == 3.0


# ---- a one-prompt bandit: five responses, known preferences ------------------------------------

PREFER = torch.tensor([[0.5, 0.7, 0.9, 0.6, 0.2],  # p(row beats column); intransitive on purpose
                       [0.3, 0.5, 0.8, 0.1, 0.7],
                       [0.1, 0.2, 0.5, 0.4, 0.6],
                       [0.4, 0.9, 0.6, 0.5, 0.3],
                       [0.8, 0.3, 0.4, 0.7, 0.5]], dtype=torch.float64)
REF = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
MU = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64)


def ipo_bandit(beta, mu):
    """Minimise ipo_loss over a table of logits with pairs from mu (None: from the policy itself),
    in exact expectation: every ordered pair (winner, loser) with its probability."""
    theta = REF.log().clone().requires_grad_()
    win, lose = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    optimizer = torch.optim.Adam([theta], lr=0.03)
    for step in range(4000):
        if step == 2500:
            optimizer.param_groups[0]["lr"] = 0.002
        logp = theta.log_softmax(0)
        source = logp.detach().exp() if mu is None else mu
        weight = source[win] * source[lose] * PREFER[win, lose]
        pair = torch.stack([logp[win], logp[lose]]).flatten(1)
        ref = torch.stack([REF.log()[win], REF.log()[lose]]).flatten(1)
        loss = (weight.flatten() * ipo_loss(pair, ref, beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return theta.detach().softmax(0)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_offline_ipo_optimum(beta):
    """pi proportional to ref * exp(p(y > mu) / beta) (arXiv:2310.12036, theorem 2), to 1e-4."""
    optimum = (REF.log() + PREFER @ MU / beta).softmax(0)
    assert torch.allclose(ipo_bandit(beta, MU), optimum, atol=1e-4)
    assert not torch.allclose(optimum, REF, atol=0.02)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_online_ipo_fixed_point(beta):
    """pi proportional to ref * exp(p(y > pi) / beta), another point than offline's, to 1e-4."""
    pi = REF.clone()
    for _ in range(5000):
        pi = (0.98 * pi.log() + 0.02 * (REF.log() + PREFER @ pi / beta)).softmax(0)
    assert torch.allclose(ipo_bandit(beta, None), pi, atol=1e-4)
    assert not torch.allclose(pi, (REF.log() + PREFER @ MU / beta).softmax(0), atol=0.01)
