"""The reliability battery: faults injected into real processes, and a check of every answer.

ledger.py    what the clients saw, one JSON line an event
check.py     a ledger against a fault-free one, and a service before and after
client.py    HTTP clients that write the ledger; workload.py makes their requests
service.py   a service, its processes, its failpoints; proxy.py is a faulty link between processes
stage.py     faults under load: when, where, and how long until all is well again
rows_*.py    the rows of the table; report.py writes docs/faults.md and the README's table
"""
