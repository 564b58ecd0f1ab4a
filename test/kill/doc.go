// Copyright (c) The azure-vnet authors. MIT licence.

// Package kill is the kill matrix: the product's programs are killed after every step that changes something, and then
// nothing is lost. It has tests only.
package kill
