// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
)

// TestALastingFailureIsOneLineWithACount, though its text differs in ages and ports from round to round.
func TestALastingFailureIsOneLineWithACount(t *testing.T) {
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	log.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})
	r := &reconciler{log: log}
	const what = "ask for addresses"
	for i := range 20 {
		r.logFailure(t.Context(), what, fmt.Errorf("wireserver: read tcp 10.240.0.4:%d->168.63.129.16:80: i/o timeout, as known %ds ago", 40000+i, 30*i))
		r.logFailure(t.Context(), "restore networks", nil)
	}
	r.logFailure(t.Context(), what, errors.New("wireserver: refused"))
	r.logFailure(t.Context(), what, nil)
	r.logFailure(t.Context(), what, nil)
	r.logFailure(t.Context(), what, errors.New("wireserver: refused"))
	got := regexp.MustCompile(`since="[^"]*"`).ReplaceAllString(out.String(), "since=S")
	const want = `level=error msg="wireserver: read tcp 10.240.0.4:40000->168.63.129.16:80: i/o timeout, as known 0s ago" what="ask for addresses"
level=info msg="fails in another way now" since=S times=20 what="ask for addresses"
level=error msg="wireserver: refused" what="ask for addresses"
level=info msg="works again" since=S times=1 what="ask for addresses"
level=error msg="wireserver: refused" what="ask for addresses"
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// The plugin stops while it works in the background. The log has no error of that.
func TestAStopAtAnyMomentLogsNoError(t *testing.T) {
	newVM(t, 2)
	data := t.TempDir()
	first := startPlugin(t, data)
	first.createNetwork(netID, nil)
	first.end()
	for i := range 40 {
		e := startPlugin(t, data)
		time.Sleep(time.Duration(i) * 2 * time.Millisecond)
		e.end()
		for line := range strings.Lines(e.log.String()) {
			if strings.Contains(line, "level=error") || strings.Contains(line, "level=warn") {
				t.Errorf("stopped after %d ms: %s", 2*i, line)
			}
		}
	}
}
