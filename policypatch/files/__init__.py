"""Files on disk: whole or absent (atomic), made once (cache), fetched and verified (sources)."""
