"""The pass broken on purpose, in many ways: for each the tests must notice. `make mutants` tries all of them."""
