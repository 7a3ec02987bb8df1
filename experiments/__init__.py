"""How our numbers came about: studies, rank runs, and the report that is made from result files."""
