"""What sessions must survive, as trials: functions of a seed that count what they did and raise what went wrong.

The tests run a few of each; ``python -m survival`` (``make crash``, ``make soak``) runs any number.
"""
