"""Reading machine code: what makes a loop, on listings small enough to check by eye."""

import pytest
from sdar_kernels.sass import matrix_loops, read_sass


def sass(*lines: str) -> str:
    """A listing as cuobjdump prints it: 16 bytes each, with the encoding behind."""
    code = [f"        /*{16 * i:04x}*/    {line} ;   /* 0x000 */" for i, line in enumerate(lines)]
    end = f"/*{16 * len(lines):04x}*/  BRA 0x{16 * len(lines):x};"
    return "\n".join(["\t\tFunction : kernel", *code, end, f"/*{16 * len(lines) + 16:04x}*/ NOP;"])


def loops(*lines: str) -> list[tuple[int, int, int]]:
    code = read_sass(sass(*lines))
    assert len(code) == len(lines)
    found = matrix_loops(code)
    return [(loop.address, loop.instructions, loop.multiplications) for loop in found]


MMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


def test_straight_code_has_no_loop() -> None:
    assert loops("MOV R1, R2", "@P0 BRA 0x30", MMA, "EXIT") == []


def test_a_loop_without_multiplication_does_not_count() -> None:
    assert loops("MOV R1, R2", "@P0 BRA 0x0", MMA, "EXIT") == []


@pytest.mark.parametrize("mma", [MMA, "HGMMA.64x64x16.F32.BF16 R24", "UTCHMMA gdesc[UR4]"])
@pytest.mark.parametrize("branch", ["@!P0 BRA", "BRA.U !UP1,", "@UP0 BRA.U"])
def test_a_loop_in_a_loop(mma: str, branch: str) -> None:
    found = loops(mma, "MOV R1, R2", mma, f"{branch} 0x10", f"{branch} 0x0", "EXIT")
    assert found == [(16, 3, 1)]


def test_a_wait_inside_a_loop_does_not_hide_it() -> None:
    found = loops(MMA, "@!P1 BRA 0x10", "@P0 BRA 0x0", "EXIT")
    assert found == [(0, 3, 1)]


def test_a_wait_moved_to_the_end_belongs_to_its_loop() -> None:
    """Its branch back leads into the middle of the second loop, which does not make a loop."""
    found = loops(
        MMA, "@P0 BRA 0x0", MMA, "@!P1 BRA 0x80", MMA, "MOV R1, R2", "@P0 BRA 0x20", "EXIT",
        "@!P1 BRA 0x80", "BRA 0x40",
    )  # fmt: skip
    assert found == [(0, 2, 1), (32, 7, 2)]


def test_a_jump_written_as_a_call() -> None:
    """As ptxas 12 leaves loops: @P0 CALL over a BRA back."""
    assert loops(MMA, "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "EXIT") == [(0, 3, 1)]


def test_a_call_returns() -> None:
    """The function called is outside the loop."""
    code = (MMA, "CALL.REL.NOINC 0x40", "@P0 BRA 0x0", "EXIT", MMA, "RET.REL.NODEC R2 0x0")
    assert loops(*code) == [(0, 3, 1)]


def test_a_guarded_exit_leaves_the_loop_only() -> None:
    assert loops(MMA, "@P0 EXIT", "BRA 0x0", "EXIT") == [(0, 3, 1)]


def test_code_that_cannot_be_followed() -> None:
    with pytest.raises(ValueError, match="an indirect branch at 0x10: BRX"):
        loops(MMA, "BRX R2 -0x10", "EXIT")
    with pytest.raises(ValueError, match="SASS of 2 functions"):
        read_sass(sass(MMA) + "\n" + sass(MMA))
    with pytest.raises(ValueError, match="SASS of 0 functions"):
        read_sass("")
