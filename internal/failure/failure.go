// Copyright (c) The azure-vnet authors. MIT licence.

// Package failure compares the texts of failures, so that a log can count a failure that comes again and again. It logs
// nothing and counts nothing itself.
package failure

import (
	"regexp"
	"sync"
)

// varying matches the words that differ each time one failure comes: ports, ids, ages and counts have digits. It is
// compiled at its first use, since each CNI call is a process and few calls fail.
var varying = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`[^\s"]*[0-9][^\s"]*`) })

// Reason returns text with a # in place of each word that has a digit. Two failures with the same Reason count as one
// failure that came twice.
func Reason(text string) string { return varying().ReplaceAllString(text, "#") }
