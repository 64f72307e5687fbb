"""A generator of attention programs: random spellings of random attention, and random damage to them.

    programs.py   a program as plain data                     draw.py     hypothesis draws one
    source.py     its Python source                           masks.py    keep-masks and biases as people write them
    damages.py    ways of breaking one                        promise.py  what must become of one that is whole
    judge.py      runs one: eager, replaced, float64          kernels.py  plain kernels that stand in for those of GPUs
    campaign.py   runs many, shrinks and saves what fails     __main__.py `make fuzz`

The one property: whatever the program, damaged or not, what the pass makes of it is as close to float64 as eager code
is, forward and backward. A program that is whole must also be replaced, unless a documented limit says otherwise.
"""
