"""Balance while serving: watch the experts' load, plan again where it pays, move experts while the engine goes on.

- `forecast` predicts the coming window, `decision` says when a new placement pays, and which; `planner` runs them
  in a process of its own.
- `speed` tells from the steps how fast ranks are; `calibration` times their experts before.
- `cost` is the time of a step and of moves, by a model; `simulation` is a whole sequence of windows by it.
- `moves` takes a layer from one layout to another: which expert goes from which rank into which slot, in which parts.
- `board` is how the parent and the ranks agree, in shared memory: who has staged what, and at which step all flip.
- `transfer` carries the bytes of experts between ranks, `streams` is a device beside its host; `migration` is a rank's
  part, `balancer` the parent's.

It knows no engine: that says where a step begins, how the loads are read, and which memory holds the board.
Letters of shapes are those of `epbackend.placement`.
"""
