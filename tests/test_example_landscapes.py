"""The examples in one and two dimensions: their numbers, tables and plots."""

import re

import example_scripts
import numpy as np
import pytest
import scipy.integrate
from absl import app
from absl.testing import flagsaver


@pytest.fixture
def example():
    """From a name to the example, whose flags are reset after the test."""
    saved = []

    def get(name):
        module = example_scripts.load(name)
        saved.append((flagsaver.save_flag_values(module.FLAGS), module.FLAGS))
        return module

    yield get
    for values, own in saved:
        flagsaver.restore_flag_values(values, own)


# --- himmelblau.py ---


def test_himmelblau_has_the_minima_that_distances_are_taken_to(example):
    module = example("himmelblau")
    assert len({tuple(point) for point in module.MINIMA.round(3)}) == 4
    np.testing.assert_allclose(
        module.himmelblau(*module.MINIMA.T), 0, atol=1e-13
    )
    end = np.array([-3.0, 4.0, 0.1])
    np.testing.assert_array_equal(module.nearest(end), module.MINIMA[1])


def test_himmelblau_starts_every_seed_anew(example):
    """Catches sigma, mu or the noise's step carried on to the next seed."""
    module = example("himmelblau")
    how = "isotropic", True, 0.1
    module.FLAGS(["example", "--seeds=2", "--steps=4", "--seed=6"])
    first, second = module.search([0.5, 1.0], *how)
    module.FLAGS(["example", "--seeds=1", "--seed=7"])
    (alone,) = module.search([0.5, 1.0], *how)
    assert first.shape == (5, 3)
    np.testing.assert_array_equal(second[0], [0.5, 1.0, 1.0])
    np.testing.assert_array_equal(second, alone)
    assert (first[1:] != second[1:]).all()


def test_himmelblau_tells_the_methods_apart(tmp_path):
    """As in the source: natural << fixed < regular.

    Twenty seeds gave .29 to 1.3 (fixed), 4 to 39 (regular) and 7e-6 to .0045
    (natural), as a NumPy implementation did: test_convergence.py. Medians of
    three are further within. It would catch methods that are mixed up, sigma
    that is not adapted, or utilities of another scale.
    """
    with example_scripts.kept_figures() as figures:
        output = example_scripts.run(
            "himmelblau", "--seeds=3", f"--plot_dir={tmp_path / 'plots'}"
        )
    rows = re.findall(
        r"^(ES|VO, \w+).*?  +([\d.e-]+)  +([\d.e-]+) to ([\d.e-]+)"
        r"  +([\d.]+)  +([\d.]+)  +([\d.-]+), ([\d.-]+)$",
        output,
        re.MULTILINE,
    )
    values = {name: [float(number) for number in row] for name, *row in rows}
    fixed, regular, natural = (
        values[name] for name in ("ES", "VO, regular", "VO, natural")
    )
    assert 0.2 < fixed[0] < 1.4
    assert 3 < regular[0] < 40
    assert natural[0] < 0.006
    for median, least, greatest, _, _, *mu in (fixed, regular, natural):
        assert least <= median <= greatest
        assert np.linalg.norm(np.array(mu) - [3, 2]) < 1.5
    # sigma: fixed, halved, and still falling; distances fall with f.
    assert fixed[3] == 1
    assert 0.3 < regular[3] < 0.6
    assert 0.05 < natural[3] < 0.25
    assert natural[4] < 0.03 < fixed[4] < regular[4]
    progress = [
        axes.lines
        for axes in figures["himmelblau.png"].axes
        if "objective" in axes.get_ylabel()
    ]
    for lines, row in zip(progress, (fixed, regular, natural), strict=True):
        ends = [line.get_ydata()[-1] for line in lines if len(line.get_ydata())]
        assert len(ends) == 3
        assert np.median(ends) == pytest.approx(row[0], rel=0.05)


# --- search_landscapes.py ---

KINKS = {
    "two_minima": [-4.5, 0.5, 2.0, 2.5],
    "sinc_steps": list(np.arange(-15.5, 16)),
}


def expectation(f, kinks, mu, sigma):
    """E[f(w)] by quadrature between the kinks, to 1e-12."""

    def integrand(z):
        return f(mu + sigma * z) * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)

    inside = (np.array(kinks) - mu) / sigma
    inside = inside[np.abs(inside) < 9]
    ends = np.concatenate([[-9], inside, [9]])
    return sum(
        scipy.integrate.quad(integrand, low, high, epsabs=1e-13)[0]
        for low, high in zip(ends[:-1], ends[1:], strict=True)
    )


def test_functions_are_those_of_the_source(example):
    module = example("search_landscapes")
    x = np.linspace(-8, 8, 1601)
    wide = (x + 4.5) * (x - 0.5) / 5
    narrow = 26 * (x - 2) * (x - 2.5)
    expected = np.minimum(np.where(x < 0.5, wide, narrow), 0)
    np.testing.assert_allclose(module.two_minima(x), expected, atol=1e-13)
    steps = module.sinc_steps(np.array([0.4, -0.4, 0.6, -3.7, 15.4, 15.6]))
    sinc = [1, 1, np.sin(1), np.sin(4) / 4, np.sin(15) / 15, 0]
    np.testing.assert_allclose(steps, -np.array(sinc), atol=1e-15)


@pytest.mark.parametrize("name", ["two_minima", "sinc_steps"])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 2.0, 6.0])
def test_bounds_are_expectations(name, sigma, example):
    module = example("search_landscapes")
    f, bound = getattr(module, name), getattr(module, f"{name}_bound")
    for mu in (-6.0, -2.0, 0.3, 2.25, 7.4):
        expected = expectation(f, KINKS[name], mu, sigma)
        assert bound(mu, sigma) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("name", ["two_minima", "sinc_steps"])
def test_bounds_have_the_limits_of_small_and_great_sigma(name, example):
    module = example("search_landscapes")
    f, bound = getattr(module, name), getattr(module, f"{name}_bound")
    x = np.array([-7.2, -2.0, 0.1, 2.25, 3.0])
    np.testing.assert_allclose(bound(x, 1e-5), f(x), atol=1e-8)
    # From far, f is a point mass: that of (right - left)^3 a / 6, or of steps.
    mass = {
        "two_minima": -(0.2 * 5**3 + 26 * 0.5**3) / 6,
        "sinc_steps": -1 - 2 * sum(np.sin(i) / i for i in range(1, 16)),
    }[name]
    far = bound(0.0, 1e3) * 1e3 * np.sqrt(2 * np.pi)
    assert far == pytest.approx(mass, rel=1e-4)


def test_minima_of_sampled_values(example):
    module = example("search_landscapes")
    x = np.arange(9.0)
    found = module.minima(x, np.array([0, 2, 1, 1, 1 + 1e-12, 3, 0.5, 4, -1]))
    np.testing.assert_array_equal(found, [[3, 1], [6, 0.5]])
    assert module.minima(x, np.zeros(9)).shape == (0, 2)


def test_minimum_of_the_bound_moves_from_the_narrow_to_the_wide(example):
    """The two sigma that the table ends with, from quadrature and slopes."""
    module = example("search_landscapes")
    switch = module.last_sigma(module.narrow_is_least, 0.01, 1.0)
    wide, narrow = (
        expectation(module.two_minima, KINKS["two_minima"], mu, switch)
        for mu in (-2.0, 2.25)
    )
    assert wide == pytest.approx(narrow, abs=1e-6)
    assert module.which(module.least(0.9 * switch)[0]) == "narrow"
    assert module.which(module.least(1.1 * switch)[0]) == "wide"
    own = module.last_sigma(module.narrow_has_a_minimum, 0.1, 8.0)
    mu = np.linspace(0.8, 4, 3000)
    for sigma, monotonic in ((0.995 * own, False), (1.005 * own, True)):
        slopes = np.diff(module.two_minima_bound(mu, sigma))
        assert (slopes[mu[1:] > 1.5] > 0).all() == monotonic


def test_search_leaves_the_narrow_minimum_for_the_wide(tmp_path):
    """From 2.25 by default: with sigma 2 to the wide one, with .1 it stays.

    Seeds 0 to 9 all ended there. It would catch a search that climbs, does not
    see beyond the minimum it starts in, or follows something else than U.
    """
    plots = tmp_path / "plots"
    arguments = "--stddevs=0.1", "--steps=120", f"--plot_dir={plots}"
    with example_scripts.kept_figures() as figures:
        output = example_scripts.run("search_landscapes", *arguments)
    number = r" +(-?[\d.]+)"
    rows = re.findall(
        rf"^{number * 3}  (\w+){number * 4}  (\w+)$", output, re.MULTILINE
    )
    (small, *_, stays), (great, *_, mu, sigma, f, bound, goes) = rows
    assert (float(small), stays) == (0.1, "narrow")
    assert (float(great), goes) == (2, "wide")
    assert float(mu) == pytest.approx(-2, abs=0.05)
    assert float(sigma) < 0.3
    assert -1.25 <= float(f) <= float(bound) < -1.23
    assert re.search(r"^two minima +-2.00 +-1.2500 +5.00$", output, re.M)
    assert re.search(r"^two minima +2.25 +-1.6250 +0.50$", output, re.M)
    assert re.search(r"^sinc in steps +0.00 +-1.0000 +7.00$", output, re.M)
    assert "narrow minimum up to sigma = 0.126" in output
    drawn = [
        line.get_xydata()
        for axes in figures["search_landscapes.png"].axes
        for line in axes.lines
    ]
    ends = [line[-1] for line in drawn if len(line) > 2]
    end = [float(mu), float(sigma)]
    assert np.min(np.linalg.norm(np.subtract(ends, end), axis=1)) < 0.01


# --- flags ---


@pytest.mark.parametrize(
    "name, argument, expected",
    [
        ("himmelblau", "--start=1,two", "two finite numbers, --start=x,y"),
        ("himmelblau", "--stddev=0.0", "--stddev in [1e-06, 1000]"),
        ("himmelblau", "--natural_rate=nan", "a positive, finite --natural"),
        ("himmelblau", "--steps=0", "--steps of 1 or more"),
        ("search_landscapes", "--start=inf", "a finite --start"),
        ("search_landscapes", "--stddevs=1,x", "--stddevs in [1e-06, "),
        ("search_landscapes", "--seed=-1", "--seed in "),
        ("search_landscapes", "--population_size=3", "an even --population"),
    ],
)
def test_flags_name_what_was_expected_and_received(name, argument, expected):
    with pytest.raises(app.UsageError) as caught:
        example_scripts.run(name, argument)
    message = str(caught.value)
    assert f"Expected {expected}" in message
    assert message.endswith(f"Received: {argument}")


@pytest.mark.parametrize("name", ["himmelblau", "search_landscapes"])
def test_arguments_that_are_no_flags_are_refused(name, example):
    with pytest.raises(app.UsageError, match="flags only. Received: .'2'"):
        example(name).main(["example", "2"])
