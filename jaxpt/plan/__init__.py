"""What a run needs on a pod, before one is rented: its real train step, compiled for that topology with no TPU here."""

from jaxpt.plan.estimate import Plan, make_plan
from jaxpt.plan.report import show, to_json

__all__ = ["Plan", "make_plan", "show", "to_json"]
