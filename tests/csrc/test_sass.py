"""The counter of instructions, on a short listing."""

import pytest
from sass import main_loop, parsed

LISTING = """
\t\tFunction : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;     /* 0x00000a0000017a02 */
                                                              /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x1000] ;
        /*0030*/              @!P0 BRA 0x60 ;
        /*0040*/                   DADD R4, R4, R6 ;
        /*0050*/                   DADD R8, R8, R10 ;
        /*0060*/                   FADD R5, R5, R4 ;
        /*0070*/               @P1 BRA 0x10 ;
        /*0080*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0090*/                   FADD R5, R5, R4 ;
        /*00a0*/                   BRA.U UP0, 0x80 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def test_the_shortest_way_through_the_main_loop_is_counted() -> None:
    assert [each.address for each in main_loop(parsed(LISTING)["kernel"], 2)] == [0x10, 0x20, 0x30, 0x60, 0x70]


def test_of_two_loops_the_one_with_more_instructions_per_load_is_counted() -> None:
    assert [each.address for each in main_loop(parsed(LISTING)["kernel"], 1)] == [0x80, 0x90, 0xA0]


def test_a_kernel_without_such_a_loop_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needed a loop with 4 loads of 16 bytes, got loops with \[2, 1, 0\]"):
        main_loop(parsed(LISTING)["kernel"], 4)
