// Copyright (c) The azure-vnet authors. MIT licence.

// Package test holds the product's promises, shown end to end: a real dockerd
// with the managed plugin in simulated VMs. It has no code of its own.
package test
