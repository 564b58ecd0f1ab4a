// Copyright (c) The azure-vnet authors. MIT licence.

//go:build !amd64 && !arm64

package kill

// older is nil where nobody has tried the tracer.
var (
	older     map[uint64]string
	olderPath map[uint64]int
)
