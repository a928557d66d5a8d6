"""Choice of the schedule, from names and integers alone. Never imports torch.

A `Problem` (`problem`) is a graph, its programs and a budget. Stages (`stages`) report to a `Search` (`search`): schedules,
which `simulate` evaluates on the original graph, and lower bounds. `pipeline` is the order of the stages and the loop that
gives them their turns, in counted `Work` (`work`); `solve` is what others call. What the stages use:

- `reorder`: beforehand, backward ops move a few places where that lowers the plain step's peak.
- `certificate` (`relaxation`, `watch_points`, `cuts`): where an op runs first (a cut), what is alive fits; a linear program
  says what that costs at least, in every schedule, and which values it would keep.
- `segments` (`pieces`, `lifetimes`): dynamic programming over where to cut the forward, what to keep of each run and what to
  run again.
- `local_search` (`incremental`): a schedule is made to fit by evictions, then freed of recomputes it does not need.
- `forward_end`: several forwards in flight, and limits of what is saved.
- `baselines`: reference schedules. `lazy`: the schedule that keeps these values and recomputes all others just before need.
- `unit_front`, `unit_choice`: for a model planned in units, the Pareto front of each kind and which point each unit takes.
- `backend`: PuLP and HiGHS. `tuning`: the constants that were tuned.
"""
