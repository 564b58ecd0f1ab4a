// Copyright (c) The azure-vnet authors. MIT licence.

// Package cni shows what the CNI plugins promise, with libcni, containerd and podman in simulated VMs.
// The tests are its only code.
package cni
