"""Messages and stubs of package `loraplex.v1`, generated from `protos/` by `make stubs`."""
