// Copyright (c) The azure-vnet authors. MIT licence.

// Command azure-vnet is the CNI main plugin: a container gets an interface on a
// bridge over the VM's NIC, with an address of the virtual network. The address
// is lent in this process, or by any other IPAM plugin that the configuration names.
package main

import (
	"os"

	"azurevnet/internal/cni"
)

// version is set when linking.
var version = "devel"

func main() {
	if len(os.Args) > 1 { // no runtime gives an argument
		os.Exit(serveWord(os.Args[1:]))
	}
	cni.Main(cni.Plugin{
		Name: "azure-vnet", Version: version, Main: true,
		Add: add, Del: del, Check: check, GC: gc, Status: status,
	})
}
