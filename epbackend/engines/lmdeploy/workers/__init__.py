"""The processes of an engine's ranks: the plug in each, a watch over them, and how they end.

- `mp` and `ray_executor` stand in the place of LMDeploy's executors and workers; `ring` is how the first talk.
- `pulse` shows how far a rank has come, `rank_watch` names the one that is lost, `process_guard` ends what is left.
"""
