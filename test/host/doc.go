// Package host has tests of the package on a Debian of its own, under its systemd (`make test-package`).
package host
