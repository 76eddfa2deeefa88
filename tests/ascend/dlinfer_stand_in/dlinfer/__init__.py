"""Lets LMDeploy's Ascend backend be imported where dlinfer, which wants CANN, cannot be installed.

It has the names that the backend imports, and computes nothing: whoever calls an operator gets an error.
"""
