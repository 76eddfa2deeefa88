"""`python -m epbackend.placement.compiled`: compiles all there is to compile; `make setup` calls it."""

from epbackend.placement.compiled import warm_up

warm_up(print)
