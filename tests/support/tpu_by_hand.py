"""A program by hand: the text of its three files, and the schedule they make."""

from helios_jax.plan.compiler import schedule

UNITS = ['MXU', 'XLU', 'VALU', 'VPOP', 'EUP', 'VLOAD', 'VLOAD:FILL', 'VSTORE', 'VSTORE:SPILL',
         'SALU']  # fmt: skip

# A loop whose step is in a branch, and in it another branch. One bundle after a branch runs anyway.
BUNDLES = """
= control target key start
LB: loop body
     0   :  { prologue }
   0x1 LB: > { step } /* Start region 1 */
   0x2   : > { %4 = sbr.rel (%p1) target = $region5 }
   0x3   :  {}
   0x4   : > { %5 = sbr.rel (%p2) target = $region6  ;;  other }
   0x5   :  {}
   0x6   : > { work } /* Start region 2 :: End region 9 */
   0x7   :  {}
   0x8   : > { work }
   0x9 PF: > { step } /* Start/End empty region 6 :: Start region 7 */
   0xa   : > { multiply }
   0xb   : > { work }
   0xc PF: > { step } /* Start/End empty region 5 */
   0xd   : > { %6 = sbr.rel (!%p3) target = $region1 }
   0xe   :  {}
   0xf   :  { epilogue }
"""


def row(**counts: int) -> list[int]:
    return [counts.get(unit, 0) for unit in UNITS]


SCALAR, IDLE, WORK, MULTIPLY = row(SALU=1), row(), row(VALU=9, VSTORE=1), row(MXU=4)
FINAL = [SCALAR, SCALAR, SCALAR, IDLE, SCALAR, IDLE, WORK, IDLE, WORK, SCALAR, MULTIPLY, WORK,
         SCALAR, SCALAR, IDLE, SCALAR]  # fmt: skip
# Two cycles more between the inner branch's bundles, three more for the product.
CYCLES = [*FINAL[:7], IDLE, IDLE, *FINAL[7:10], *[MULTIPLY] * 3, *FINAL[10:]]


def utilization(rows: list[list[int]]) -> str:
    lines = [' '.join(map(str, r)) for r in rows]
    head = ['== CAPACTIY:', ', '.join(UNITS), '4 3 4 2 1 3 3 1 1 2', '== UTILIZATION:']
    return '\n'.join([*head, *lines]) + '\n'


def by_hand() -> schedule.Schedule:
    return schedule.parse(BUNDLES, utilization(FINAL), utilization(CYCLES), 1)
