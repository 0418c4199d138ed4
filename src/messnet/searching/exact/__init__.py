"""The machinery that finds and proves optima: enumeration, branch and bound, certificates."""
