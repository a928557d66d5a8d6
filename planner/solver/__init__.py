"""Names and integers in, a schedule out: everything that decides. Never imports torch.

How a budget is met (`solve.Solver`, `hunt.Hunt`), each stage only while the plan can still be far from the optimum:

1. `reorder`: backward ops move a few places where that lowers the plain step's peak.
2. `bound`: the certificate. At one moment of the step (a cut, found by `cuts`), what is alive must fit; a linear program says
   what that costs at least, whatever the schedule, and which values it would keep. Where the schedule that keeps them breaks
   the budget, the next round cuts too.
3. `local_search`: that schedule is made to fit by evictions, then freed of recomputes it does not need.
4. `closure`: the program over kept sets, on a coarser graph (`coarsen`), with exact copies of the moments that break.
5. `blocks`: where the forward is a long chain (`pieces`), dynamic programming over where to cut it and what each block keeps.
6. `window`: a few stretches of the schedule are decided anew in integers, any value made again any number of times.
7. `chain`: for very low budgets, the same with blocks that are recomputed more than once.

`simulate` judges every schedule on the original graph; `pool` remembers the good ones, so that a plan for a small budget is a
plan for a larger one. Graphs of a few ops are searched exhaustively.
"""
