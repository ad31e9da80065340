"""The engine: scheduler, adapter manager, executor and worker; knows no HTTP."""
