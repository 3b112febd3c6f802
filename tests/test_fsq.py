"""The quantizer whose codebook is a grid: its levels, how often each is used."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

BEATS = r"[\s\S]*got: [\s\S]*write: "
q = sg.quantize
VARIANTS = ["paper", "lucidrains", "symmetric"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def bound_by_hand(z, levels, variant):
    """Of the papers and of vector-quantize-pytorch, in float64; and the divisor."""
    z, levels = np.asarray(z, np.float64), np.array(levels)
    if variant == "symmetric":
        return np.tanh(z) * (levels - 1) / 2, (levels - 1) / 2
    sign, inverse = {"paper": (-1, np.tan), "lucidrains": (1, np.arctanh)}[variant]
    half = (levels - 1) * (1 + sign * 1e-3) / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    return np.tanh(z + inverse(offset / half)) * half - offset, levels // 2


def codes_by_hand(z, levels, variant):
    bound, width = bound_by_hand(z, levels, variant)
    if (
        variant == "symmetric"
    ):  # 2 / (L - 1) * floor((L - 1) (tanh z + 1) / 2 + 1/2) - 1
        return np.floor(bound + width + 0.5) / width - 1
    return np.round(bound) / width


@every_variant
def test_it_is_its_definition(variant, run):
    levels = (8, 5, 2, 3)
    z = 2 * normal(0, 1000, 4)
    f = run(lambda z: q.fsq(z, levels, variant=variant))
    np.testing.assert_allclose(
        f(z), codes_by_hand(z, levels, variant), rtol=1e-6, atol=1e-7
    )
    h = 1e-5
    moved = [bound_by_hand(np.float64(z) + s, levels, variant) for s in (h, -h)]
    slopes = (moved[0][0] - moved[1][0]) / (2 * h) / moved[0][1]
    ct = jnp.cos(z)
    got = jax.grad(lambda z: jnp.vdot(ct, f(z)))(z)
    np.testing.assert_allclose(got, np.asarray(ct) * slopes, atol=2e-6)
    np.testing.assert_allclose(
        jax.jvp(f, (z,), (ct,))[1], np.asarray(ct) * slopes, atol=2e-6
    )


def numbers(count, variant):
    """Return the numbers that a count of levels makes, divided."""
    if variant == "symmetric":
        return np.linspace(-1, 1, count)
    return np.arange(-(count // 2), (count + 1) // 2) / (count // 2)


@every_variant
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9, 16])
def test_it_has_all_its_levels_and_no_others(count, variant):
    z = jnp.concatenate(
        [jnp.linspace(-9, 9, 4001, dtype="float32"), f32(-jnp.inf, jnp.inf)]
    )
    codes = np.unique(q.fsq(z[:, None], [count], variant=variant))
    np.testing.assert_allclose(
        np.unique(codes + 0.0), numbers(count, variant), atol=1e-6
    )


@every_variant
def test_the_ends_of_every_number_of_levels(variant):
    """Up to the 1,000 that are allowed, exactly; one more, and the others miss it."""
    counts = list(range(2, 1001))
    z = jnp.broadcast_to(f32(-50.0, 50.0)[:, None], (2, len(counts)))
    ends = np.float64(q.fsq(z, counts, variant=variant))
    expected = np.stack([numbers(n, variant)[[0, -1]] for n in counts], -1)
    np.testing.assert_allclose(ends, expected, rtol=1e-7)
    for count in (1001, 1002, 1003):
        if variant == "symmetric":
            assert q.fsq(f32(50.0), [count], variant=variant)[0] == 1
        else:
            refused = "at most 1000 levels" + BEATS + r'fsq\(z, levels, variant="sym'
            with pytest.raises(ValueError, match=refused):
                q.fsq(f32(50.0), [count], variant=variant)
    if variant != "symmetric":  # two levels too many, or too few
        bound, width = bound_by_hand(8.0, 1003, variant)
        assert np.round(bound) / width != numbers(1003, variant)[-1]


@pytest.mark.parametrize(
    ("dtype", "counts"),
    [
        ("bfloat16", (256, 300, 512, 513, 514, 515, 520, 600, 1000)),
        ("float16", (2048, 4096, 4097, 4098, 4099, 5000)),
    ],
    ids=["bfloat16", "float16"],
)
def test_levels_that_are_one_number_are_refused(dtype, counts):
    z = normal(0, 1).astype(dtype)
    for count in counts:
        for variant in ["symmetric", "paper"] if count <= 1000 else ["symmetric"]:
            codes = jnp.asarray(numbers(count, variant), dtype)
            if len(np.unique(np.float32(codes))) == count:
                assert q.fsq(z, [count], variant=variant).dtype == dtype
                continue
            with pytest.raises(ValueError, match=f"different numbers in {dtype}"):
                q.fsq(z, [count], variant=variant)
    with pytest.raises(ValueError, match="different numbers"):
        q.fsq(z, [counts[-1]], variant="symmetric")
    q.fsq(z, counts[:1], variant="symmetric")


def test_narrow_codes_are_those_of_float32_rounded_once():
    z = jnp.linspace(-4, 4, 256).astype(jnp.bfloat16)[:, None]
    f = lambda z: q.fsq(z, [16], variant="symmetric")
    np.testing.assert_array_equal(f(z), f(z.astype("float32")).astype("bfloat16"))


# What is said -----------------------------------------------------------------------


def usage(count, variant):
    """Return how often each code is used of a standard normal z, in closed form."""
    half, offset = (count - 1) / 2, 0.5 if count % 2 == 0 else 0.0
    if variant == "symmetric":
        ends = np.arctanh((np.arange(count - 1) - half + 0.5) / half)
    else:
        half *= {"paper": 1 - 1e-3, "lucidrains": 1 + 1e-3}[variant]
        inverse = {"paper": np.tan, "lucidrains": np.arctanh}[variant]
        numbers = np.arange(-(count // 2), (count + 1) // 2 - 1)
        ends = np.arctanh((numbers + 0.5 + offset) / half) - inverse(offset / half)
    return np.diff([0, *map(NormalDist().cdf, ends), 1])


@every_variant
def test_how_often_codes_are_used(variant):
    """Counted, at quantiles of the normal distribution, as in closed form."""
    size, counts = 20_000, [2, 3, 4, 5, 6, 8]
    z = f32(*map(NormalDist().inv_cdf, (np.arange(size) + 0.5) / size))
    codes = q.fsq(
        jnp.broadcast_to(z[:, None], (size, len(counts))), counts, variant=variant
    )
    for column, count in zip(np.asarray(codes).T, counts, strict=True):
        edges = numbers(count, variant) + 1e-4
        counted = np.diff(np.searchsorted(np.sort(column), [-2, *edges])) / size
        np.testing.assert_allclose(counted, usage(count, variant), atol=2 / size)


def test_what_the_docstring_says_of_usage():
    percent = lambda count, variant: [
        float(f"{100 * end:.5g}")
        for end in (usage(count, variant).min(), usage(count, variant).max())
    ]
    assert round(percent(2, "paper")[1], 1) == 94.1
    assert round(percent(2, "lucidrains")[1], 3) == 99.993
    np.testing.assert_allclose(percent(2, "symmetric"), 50)
    for variant in ("paper", "lucidrains"):
        low, high = percent(4, variant)
        assert 12 < low < high < 33
    low, high = percent(4, "symmetric")
    assert 21 < low < high < 29
    for variant in VARIANTS:
        for count in (*range(3, 40), 100, 333, 500, 999, 1000):
            assert usage(count, variant).max() < 1.7 / count
    # No even number of levels is more even in the others.
    for count in range(2, 40, 2):
        most = [usage(count, variant).max() for variant in VARIANTS]
        assert min(most) == most[2]


@every_variant
def test_value_and_bound_are_close(variant):
    z = jnp.linspace(-6, 6, 4001, dtype=jnp.float32)
    for count in (2, 3, 4, 7, 16):
        bound, width = bound_by_hand(z, count, variant)
        apart = np.abs(
            q.fsq(z[:, None], [count], variant=variant)[:, 0] - bound / width
        )
        assert apart.max() < 1.0001 / (count - 1)


def test_symmetric_is_symmetric_and_sharp_at_0():
    z = 3 * normal(0, 4000, 5)
    f = lambda z: q.fsq(z, (2, 3, 4, 5, 8), variant="symmetric")
    np.testing.assert_array_equal(f(-z), -f(z))
    tiny = f32(-1e-30, -1e-9, 0.0, 1e-9, 1e-30)
    np.testing.assert_array_equal(
        q.fsq(tiny[:, None], [2], variant="symmetric")[:, 0], [-1, -1, 1, 1, 1]
    )
    np.testing.assert_allclose(
        q.fsq(f32(0.0, 0.0), (4, 5), variant="symmetric"), [1 / 3, 0]
    )


def test_of_equally_near_numbers_the_greater():
    """At 0 an even number of levels has two."""
    codes = q.fsq(f32(0.0, 0.0, -0.0), [2, 4, 8], variant="symmetric")
    np.testing.assert_allclose(codes, [1, 1 / 3, 1 / 7], rtol=1e-6)


@every_variant
def test_nothing_comes_back_from_where_tanh_is_one(variant):
    slope = jax.vmap(jax.grad(lambda z: q.fsq(z[None], [4], variant=variant)[0]))
    slopes = slope(f32(-20.0, -3.0, 0.0, 3.0, 20.0))
    np.testing.assert_array_equal(slopes > 0, [False, True, True, True, False])


def test_variants_differ():
    z = jnp.zeros((1, 1), jnp.float32)
    assert q.fsq(z, [4])[0, 0] == q.fsq(z, [4], variant="lucidrains")[0, 0] == 0
    wide = jnp.linspace(-5, 5, 400, dtype=jnp.float32)[:, None]
    values = [q.fsq(wide, [2], variant=variant) for variant in VARIANTS]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0 < np.sum((values[a] < 0) != (values[b] < 0)) < 400


def test_to_second_order():
    levels, z = (5, 8), f32(0.3, -0.7)
    for variant, factor in (("paper", 0.999), ("symmetric", 1.0)):
        smooth = lambda z, factor=factor: jnp.tanh(z[0]) * factor
        f = lambda z, variant=variant: q.fsq(z, levels, variant=variant)[0]
        for second in (jax.jacrev, jax.jacfwd):
            got = second(jax.grad(f))(z)
            np.testing.assert_allclose(
                got, jax.hessian(smooth)(z), rtol=1e-5, atol=1e-7
            )


# Bad input --------------------------------------------------------------------------

Z = normal(0, 5, 3)
BAD = {
    "levels has 3 entries": (ValueError, lambda: q.fsq(Z, (8, 5))),
    r"fsq\(z, 8, [\s\S]*levels has 3 entries": (ValueError, lambda: q.fsq(Z, 8)),
    r"levels\[1\] is an int, at least 2": (ValueError, lambda: q.fsq(Z, (8, 1, 5))),
    r"levels\[2\] is an int": (TypeError, lambda: q.fsq(Z, (8, 5, 5.0))),
    'variant is "paper", "lucidrains" or "symmetric"': (
        ValueError,
        lambda: q.fsq(Z, (8, 5, 5), variant="other"),
    ),
    r"fsq\([\s\S]*z is an array of real floats": (
        TypeError,
        lambda: q.fsq(jnp.ones((2, 3), int), (8, 5, 5)),
    ),
    r"fsq\([\s\S]*z has at least 1 axis": (ValueError, lambda: q.fsq(1.0, (8,))),
}


@pytest.mark.parametrize(("words", "case"), BAD.items(), ids=range(len(BAD)))
def test_bad_input(words, case):
    kind, call = case
    with pytest.raises(kind, match=words + BEATS):
        call()


@pytest.mark.parametrize(
    ("dtype", "count"), [("float32", 1001), ("bfloat16", 600), ("bfloat16", 2000)]
)
def test_what_is_said_to_write_works(dtype, count):
    z, levels = jnp.ones(1, dtype), [count]
    with pytest.raises(ValueError, match="levels") as caught:
        q.fsq(z, levels)
    written = str(caught.value).split("write: ")[1]
    code = eval(written, {"fsq": q.fsq, "z": z, "levels": levels, "jnp": jnp})
    assert code.dtype == jnp.float32
