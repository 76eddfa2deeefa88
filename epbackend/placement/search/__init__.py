"""The compiled part of placement: numba functions whose machine code is kept on disk.

| module            | what it does                             | called by                                  |
|-------------------|------------------------------------------|--------------------------------------------|
| `compiled`        | compiles, and keeps what it can          | the modules below                          |
| `layer_search`    | balances recorded loads, layer by layer  | `planners.refined`, `planners.incremental` |
| `level_search`    | prepares a layer for the `level` split   | `planners.level`                           |
| `level_split`     | is the `level` split, batch by batch     | `replica_split`                            |
| `affinity_search` | gathers experts that are chosen together | `affinity`, `visits`                       |

numba notices a change in the file of a kept function, but not in the files of functions compiled into it. So no module
here compiles in a function of another one, and a few lines are written twice.

Nothing here is imported with `epbackend.placement`: planners and splits import what they need when they are called.
"""
