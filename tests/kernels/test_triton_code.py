"""What Triton's compiler makes of the kernels for an H200; for that no GPU is needed."""

import importlib.util
import re

import pytest

from polyak.kernels import compensated
from polyak.kernels.gpu import launch
from polyak.kernels.gpu.encoding import AVERAGE_UNIT, FORMATS, digits, kind_of
from polyak.kernels.gpu.table import BLOCK
from polyak.kernels.modes import MODES

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(launch.is_interpreted(), reason="Triton was told to interpret"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(function, arguments, constants):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = [*arguments, *constants]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in arguments.items() if kind[0] == "*"}
    source = ASTSource(
        function,
        {**arguments, **dict.fromkeys(constants, "constexpr")},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options=launch.OPTIONS)


# Modes and dtypes of the averages.
FORMS = [(mode, dtype) for mode in MODES for dtype in mode.in_triton]


def kind(source, form, *, is_vector):
    mode, average = form
    return kind_of(mode, source=source, average=average, is_vector=is_vector)


def compiled_update(*kinds, profiles):
    from polyak.kernels.gpu.update import update

    return compiled(
        update,
        {"rows": "*i64", "chunks": "*i64", "step": "u64", "weights": ("fp32",) * profiles},
        {"KINDS": tuple(map(digits, kinds)), "PROFILES": profiles, "BLOCK": BLOCK, "INTERPRETED": False},
    )


def instructions(code, name):
    return re.findall(rf"\b{name}[\w.:]*", code.asm["ptx"])


def check_arithmetic(code):
    """No float64; sums and products that the assembler may not fuse, in full range; nothing through shared memory."""
    ptx = code.asm["ptx"]
    assert ".f64" not in ptx
    assert ".ftz" not in ptx
    assert not re.search(r"\b(add|sub|mul|mad)\.f32", ptx)
    assert code.metadata.shared == 0


@pytest.mark.protects
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("source", FORMATS, ids=str)
def test_each_kind_by_itself(source, form):
    mode, average = form
    code = compiled_update(kind(source, form, is_vector=True), profiles=1)
    check_arithmetic(code)
    assert instructions(code, "fma.rn.f32")
    # The widest: 16 bytes of float32, 8 of 16 bits.
    wide = {
        "ld.global.v4.b32": source.itemsize == 4 or average.itemsize == 4,
        "ld.global.v2.b32": source.itemsize == 2 or average.itemsize == 2 or mode is compensated,
    }
    for instruction, is_expected in wide.items():
        assert bool(instructions(code, instruction)) == is_expected, instruction
    assert instructions(code, "st.global.v4.b32" if average.itemsize == 4 else "st.global.v2.b32")
    assert not instructions(code, "st.global.b16")
    check_arithmetic(compiled_update(kind(source, form, is_vector=False), profiles=2))


@pytest.mark.parametrize("form", [form for form in FORMS if form[0].draws], ids=str)
def test_two_neighbours_share_a_draw(form):
    """With vectors, a thread draws 4 times for 8 elements; without, for 4, as a chunk may begin at an odd place."""
    for is_vector in (True, False):
        code = compiled_update(kind(FORMATS[0], form, is_vector=is_vector), profiles=2)
        # A factor of the mixing function.
        assert len(re.findall(r"mul\.lo\.s32 .*, -2048144789;", code.asm["ptx"])) == 4


def test_different_kinds_in_one_kernel_shuffle_nothing():
    (plain, compensated, bfloat16, float16), (wide, brain, _) = FORMS, FORMATS
    kinds = [
        kind(wide, plain, is_vector=False),
        kind(wide, plain, is_vector=True),
        kind(brain, plain, is_vector=True),
        kind(brain, compensated, is_vector=True),
        kind(wide, bfloat16, is_vector=True),
        kind(brain, bfloat16, is_vector=True),
        kind(brain, float16, is_vector=False),
    ]
    check_arithmetic(compiled_update(*kinds, profiles=2))


def test_the_search_for_what_is_not_finite():
    from polyak.kernels.gpu.skip import find_bad

    code = compiled(
        find_bad,
        {"rows": "*i64", "chunks": "*i64", "flag": "*i32", "bad_rows": "*i32"},
        {"SOURCES": tuple(map(digits, range(AVERAGE_UNIT))), "PROFILES": 2, "BLOCK": BLOCK},
    )
    assert ".f64" not in code.asm["ptx"]
    assert instructions(code, "ld.global.v4.b32")


def test_what_runs_on_growth_in_device_memory():
    from polyak.kernels.gpu.skip import copy_settled, settle
    from polyak.kernels.gpu.update import update_settled

    kinds = tuple(kind(FORMATS[0], form, is_vector=True) for form in (FORMS[0], FORMS[2]))
    pointers = {"rows": "*i64", "chunks": "*i64", "counts": "*i64", "weights": "*fp32"}
    constants = {"KINDS": tuple(map(digits, kinds)), "PROFILES": 2, "BLOCK": BLOCK, "INTERPRETED": False}
    check_arithmetic(compiled(update_settled, pointers, constants))
    doubles = {"minus_weights": "*fp64", "minus_pending": "*fp64"}
    others = {"flag": "*i32", "counts": "*i64", "weights": "*fp32"}
    compiled(settle, {**doubles, **others}, {"PROFILES": 3, "SIZE": 4})
    sizes = {"SIZES": (1, 2, 4, 8), "BLOCK": BLOCK}
    check_arithmetic(compiled(copy_settled, {"chunks": "*i64", "counts": "*i64"}, sizes))
