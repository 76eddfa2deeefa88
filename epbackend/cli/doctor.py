"""`epbackend doctor`: what this machine can do, and what it lacks for the rest."""
import typer
def doctor() -> None:
    """x"""
