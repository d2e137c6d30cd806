"""Chapter 1 against closed forms."""
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tests.forked import run_forked

sys.path.insert(0, str(Path(__file__).parent))
import diffusion as chapter
import draw

from sampler import SIGMAS, karras, sample_dpmpp_2m, sample_euler

torch.set_num_threads(1)
SCRIPT = Path(chapter.__file__)
MIXTURE = chapter.make_mixture([0.5, 0.3, 0.2])
ONE = chapter.Mixture(
    torch.tensor([0.2, 0.5, 0.3]), torch.tensor([[1.0, -2.0]] * 3), torch.tensor([0.5] * 3)
)  # three times the same Gaussian


def in_torch(sigma: float) -> MixtureSameFamily:
    """The noised mixture, by torch.distributions."""
    spread = (MIXTURE.widths**2 + sigma**2).sqrt()[:, None].expand(3, 2)
    return MixtureSameFamily(
        Categorical(MIXTURE.weights), Independent(Normal(MIXTURE.centres, spread), 1)
    )


def test_mixture_has_mean_0_and_variance_1():
    x = in_torch(0.0)
    assert (
        torch.allclose(x.mean, torch.zeros(2), atol=1e-6)
        and abs(float(x.variance.mean()) - 1) < 1e-6
    )
    torch.manual_seed(0)
    drawn = chapter.draw_data(MIXTURE, 40000)
    assert drawn.mean(0).abs().max() < 0.02 and abs(float(drawn.var(0).mean()) - 1) < 0.02
    shares, widths = chapter.weights_and_widths(MIXTURE, drawn)
    assert torch.allclose(shares, MIXTURE.weights, atol=0.01) and torch.allclose(
        widths, MIXTURE.widths, atol=0.005
    )


def test_score_of_one_gaussian():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 4
    for sigma in (0.1, 3.0):
        assert torch.allclose(
            chapter.score(ONE, x, sigma),
            -(x - torch.tensor([1.0, -2.0])) / (0.5**2 + sigma**2),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("sigma", [0.05, 0.7, 14.6])
def test_score_is_the_gradient_of_the_log_density(sigma):
    x = (
        torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * (1 + sigma)
    ).requires_grad_()
    log_p = in_torch(sigma).log_prob(x)
    assert torch.allclose(
        chapter.log_shares(MIXTURE, x, sigma).logsumexp(1), log_p, atol=1e-4, rtol=1e-4
    )
    (expected,) = torch.autograd.grad(log_p.sum(), x)
    assert torch.allclose(chapter.score(MIXTURE, x, sigma), expected, atol=1e-3 / sigma, rtol=1e-3)
    each = torch.full((200, 1), sigma)  # one sigma per point, as in training
    assert torch.allclose(
        chapter.score(MIXTURE, x, each), chapter.score(MIXTURE, x, sigma), atol=1e-6
    )


def test_denoise_is_the_mean_of_x0_given_x():
    """By quadrature: the integral of x_0 p(x_0) N(x; x_0, sigma^2), over that without x_0."""
    x0 = 3.5 * chapter.square_grid(301)
    for x in torch.tensor([[0.1, 0.0], [1.0, 0.8]]):
        weight = (in_torch(0.0).log_prob(x0) - (x - x0).square().sum(1) / (2 * 0.6**2)).softmax(0)
        assert torch.allclose(
            chapter.exact_denoise(MIXTURE, x[None], 0.6)[0], weight @ x0, atol=1e-3
        )


def test_noise_of_the_lectures_code():
    assert abs(chapter.lecture_sigma(1) - 9.8452) < 5e-5 and chapter.lecture_sigma(0) == 0
    torch.manual_seed(0)
    x = torch.randn(20000, 2)
    assert abs(float((chapter.forward_sde(x, 200) - x).std()) - 9.8452) < 0.1  # 3 standard errors


def test_euler_maruyama_step_and_its_noise():
    """One step by hand: drift g^2 dt times the score, noise of variance g^2 dt."""
    x, noise = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.7, -0.2]])
    (step,) = chapter.reverse_sde(partial(chapter.exact_denoise, ONE), x, [2.0, 1.5], lambda: noise)
    expected = (
        x - (4 - 2.25) * (x - torch.tensor([1.0, -2.0])) / (0.25 + 4) + (4 - 2.25) ** 0.5 * noise
    )
    assert torch.allclose(step.x, expected, atol=1e-5)


def test_ode_of_one_gaussian():
    """Its solution: the distance to the centre shrinks as sqrt(width^2 + sigma^2)."""
    x, centre = torch.tensor([[9.0, 1.0]]), torch.tensor([1.0, -2.0])
    sigmas = karras(1000, SIGMAS) + [0.0]
    *_, last = sample_euler(partial(chapter.exact_denoise, ONE), x, sigmas, noise=None)
    assert torch.allclose(
        last.x - centre, (x - centre) * (0.25 / (0.25 + sigmas[0] ** 2)) ** 0.5, rtol=5e-3
    )


@pytest.mark.parametrize("name", ["sde", "lecture", "ancestral", "ode", "dpmpp_2m"])
def test_sde_and_ode_recover_weights_and_widths(name):
    fine = karras(200, SIGMAS) + [0.0]
    clock = [chapter.lecture_sigma(1 - i / 200) for i in range(201)]
    sampler, sigmas = {
        "sde": (chapter.reverse_sde, fine),
        "lecture": (chapter.reverse_sde, clock),
        "ode": (sample_euler, fine),
        "ancestral": (partial(sample_euler, eta=1.0), fine),
        "dpmpp_2m": (sample_dpmpp_2m, karras(20, SIGMAS) + [0.0]),
    }[name]
    torch.manual_seed(0)
    weights, widths = chapter.weights_and_widths(
        MIXTURE, chapter.sample(sampler, partial(chapter.exact_denoise, MIXTURE), sigmas, 8000)
    )
    assert (
        (weights - MIXTURE.weights).abs()
        < 3.5 * (MIXTURE.weights * (1 - MIXTURE.weights) / 8000).sqrt()
    ).all(), weights
    assert torch.allclose(widths, MIXTURE.widths, rtol=0.1)


def test_preserving_and_exploding_are_one_process():
    torch.manual_seed(0)
    sigmas, denoise = karras(15, SIGMAS), partial(chapter.exact_denoise, MIXTURE)
    x = 14.6 * torch.randn(500, 2)
    *_, last = sample_euler(denoise, x, sigmas, noise=None)
    x_t = chapter.ddim(denoise, x / (1 + sigmas[0] ** 2) ** 0.5, sigmas)
    assert torch.allclose(x_t * (1 + sigmas[-1] ** 2) ** 0.5, last.x, atol=1e-4)


def test_noised_points_have_the_noise_they_say():
    torch.manual_seed(0)
    x, t, sigma, noise = chapter.noised(MIXTURE, 20000)
    assert (
        torch.equal(sigma[:, 0], SIGMAS.float()[t])
        and t.min() >= 0
        and t.max() <= 999
        and abs(float(t.float().mean()) - 499.5) < 8
    )
    x0 = x - sigma * noise
    assert torch.allclose(chapter.weights_and_widths(MIXTURE, x0)[0], MIXTURE.weights, atol=0.015)


def test_learned_field_nears_the_exact_one():
    """The first loss is the noise's variance, 1. Loss and error fall, and differ by a constant."""
    torch.manual_seed(0)
    x, t, sigma, noise = chapter.noised(MIXTURE, 20000)
    exact, losses, errors = -sigma * chapter.score(MIXTURE, x, sigma), [], []
    for step, f in enumerate(chapter.learn(MIXTURE, 240, sign=-1)):
        if step in (0, 30, 240):
            with torch.no_grad():
                answer = f(x / (1 + sigma**2) ** 0.5, t)
            losses.append(float((noise - answer).square().mean()))
            errors.append(float((exact - answer).square().mean()))
    assert abs(losses[0] - 1) < 0.03
    assert errors[1] < errors[0] / 2 and errors[2] < errors[0] / 6, errors
    floor = float((noise - exact).square().mean())
    assert all(abs(loss - error - floor) < 0.02 for loss, error in zip(losses, errors))


def test_the_two_losses_train_one_net_up_to_its_sign():
    torch.manual_seed(0)
    x, t, *_ = chapter.noised(MIXTURE, 100)
    (*_, score_net), (*_, eps_net) = (
        chapter.learn(MIXTURE, 20, sign=+1),
        chapter.learn(MIXTURE, 20, sign=-1),
    )
    assert (
        torch.allclose(score_net(x, t), -eps_net(x, t), atol=1e-5)
        and eps_net(x, t).abs().max() > 0.1
    )


def test_script_runs(tmp_path):
    done = run_forked(SCRIPT, "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "diffusion.gif") as gif:
        assert gif.n_frames == 6
    assert {p.name for p in tmp_path.iterdir()} == {
        "diffusion.gif",
        "diffusion_forward.png",
        "diffusion_field.png",
    }


@pytest.mark.parametrize(
    "weights", [["0.5", "0.5", "0.5"], ["1", "0", "0"], ["nan", "0.5", "0.5"], ["-0.5", "1", "0.5"]]
)
def test_wrong_weights_get_one_line(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["diffusion.py", "--out", str(tmp_path), "--weights", *weights]
    )
    with pytest.raises(SystemExit) as left:
        draw.run(chapter.main, chapter.__doc__, weights=dict(type=float, nargs=3))
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and "sum is 1" in error
