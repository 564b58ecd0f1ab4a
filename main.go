// Copyright (c) The azure-vnet authors. MIT licence.

// Command azure-vnet-plugin is the managed Docker plugin: see internal/plugin.
package main

import (
	"fmt"
	"os"

	"azurevnet/internal/plugin"
)

// version is set when linking.
var version = "devel"

func main() {
	if err := plugin.Run(version, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "azure-vnet-plugin:", err)
		os.Exit(1)
	}
}
