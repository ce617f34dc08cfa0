"""Account-side services: snapshots, target-position expansion, virtual funds, reads for people. No fleet comes here, and they change no history."""
