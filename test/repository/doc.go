// Copyright (c) The azure-vnet authors. MIT licence.

// Package repository holds the sources to the design: arrows, lengths, comments, and a row for each error.
// The tests are its only code.
package repository
