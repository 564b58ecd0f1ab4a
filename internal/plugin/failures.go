// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"azurevnet/internal/failure"
)

// failureRow is one failure that came once or more in a row.
type failureRow struct {
	text  string // of the first time, as it was logged
	since time.Time
	times int
}

// isRepeatedBy reports whether text is the same failure again. Ports, ages and counts in the text may differ.
func (w failureRow) isRepeatedBy(text string) bool {
	return failure.Reason(w.text) == failure.Reason(text)
}

// logFailure logs the outcome of one part of a round. It logs an error when it comes first, when it changes, and when
// it is gone, and not in each round. When the error changes or is gone, logFailure also logs how often it came. what
// names the part.
//
// While the plugin stops, all parts are broken off. The errors of that are no failures.
func (r *reconciler) logFailure(ctx context.Context, what string, err error) {
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		r.log.WithField("what", what).WithError(err).Debug("broken off: the plugin stops")
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failures == nil {
		r.failures = map[string]failureRow{}
	}
	before, failed := r.failures[what]
	text := ""
	if err != nil {
		text = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	if failed && err != nil && before.isRepeatedBy(text) {
		before.times++
		r.failures[what] = before
		return
	}
	if failed {
		now := "fails in another way now"
		if err == nil {
			now = "works again"
		}
		r.log.WithFields(logrus.Fields{"what": what, "times": before.times, "since": before.since.Format(time.RFC3339)}).Info(now)
		delete(r.failures, what)
	}
	if err != nil {
		r.log.WithField("what", what).Error(text)
		r.failures[what] = failureRow{text: text, since: time.Now(), times: 1}
	}
}
