// Copyright (c) The azure-vnet authors. MIT licence.

// Package docker shows what the Docker plugin promises, with a real dockerd in simulated VMs.
// The tests are its only code.
package docker
