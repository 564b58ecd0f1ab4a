// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

// identity is what makes a link the host's own.
type identity struct{}
