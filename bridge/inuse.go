// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

// InUseError says that another endpoint has the address, the MAC or the port of the host that was asked for.
type InUseError struct {
	Owner string // of the other endpoint, as it stands in the text: a caller may replace it there by a name; empty: not an endpoint of ours
	text  string
}

// Error names the owner, and says what to do.
func (e *InUseError) Error() string { return e.text }
