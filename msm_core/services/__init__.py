"""Account-side services: snapshots, target-position expansion, virtual funds, reads for people.

No fleet comes here, and nothing here changes the history of a portfolio.
"""
