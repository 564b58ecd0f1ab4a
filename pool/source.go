// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	wireServerURL = "http://168.63.129.16/machine/plugins?comp=nmagent&type=getinterfaceinfov1"
	imdsURL       = "http://169.254.169.254/metadata/instance/network?api-version=2021-02-01"
	imdsOldAPI    = "2019-06-01" // known to hosts that answer 400 to the other

	mostBody = 1 << 20 // bytes; 256 addresses are 15 KB
	tries    = 3       // of one question, while its time lasts
)

// source is one place that tells this VM's addresses.
type source struct {
	name  string // in leases.json and in messages
	fetch func(context.Context) ([]byte, error)
	parse func([]byte) (document, error)
}

// sourcesOf returns what to ask, in order.
func sourcesOf(name, queryURL string) ([]source, error) {
	if queryURL != "" {
		u, err := url.Parse(queryURL)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("query URL %q is not one such as http://host/path", queryURL)
		}
	}
	switch {
	case name == "" || name == "auto":
		return []source{wireServerSource(queryURL), imdsSource("")}, nil
	case name == "wireserver":
		return []source{wireServerSource(queryURL)}, nil
	case name == "imds":
		return []source{imdsSource(queryURL)}, nil
	case filepath.IsAbs(name) && queryURL == "":
		return []source{fileSource(name)}, nil
	case filepath.IsAbs(name):
		return nil, fmt.Errorf("source %s is a file, which has no query URL: leave out the URL, or name another source", name)
	}
	return nil, fmt.Errorf("source %q is none of auto, wireserver, imds, or the absolute path of a file", name)
}

func wireServerSource(at string) source {
	if at == "" {
		at = wireServerURL
	}
	return source{"wireserver", func(ctx context.Context) ([]byte, error) { return getBody(ctx, at, nil) }, parseXML}
}

func imdsSource(at string) source {
	if at == "" {
		at = imdsURL
	}
	header := http.Header{"Metadata": {"true"}}
	return source{"imds", func(ctx context.Context) ([]byte, error) {
		body, err := getBody(ctx, at, header)
		var status *statusError
		if errors.As(err, &status) && status.code == http.StatusBadRequest {
			return getBody(ctx, olderAPI(at), header)
		}
		return body, err
	}, parseIMDS}
}

func olderAPI(at string) string {
	u, err := url.Parse(at)
	if err != nil {
		return at
	}
	q := u.Query()
	q.Set("api-version", imdsOldAPI)
	u.RawQuery = q.Encode()
	return u.String()
}

func fileSource(path string) source {
	return source{path, func(context.Context) ([]byte, error) {
		f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // else a FIFO keeps all waiting
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if info, err := f.Stat(); err != nil {
			return nil, err
		} else if !info.Mode().IsRegular() {
			return nil, errors.New("it is not a file: name a regular file")
		}
		return readBody(f)
	}, parseFile}
}

// newClient goes straight to the host under the VM: these addresses are link
// local, and a proxy or a redirect would ask another machine about its own.
func newClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:        (&net.Dialer{}).DialContext,
			DisableKeepAlives:  true, // one question in many seconds, often the process's last act
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// getBody asks until an answer comes, the refusal is final or ctx would be done
// before the next try.
func getBody(ctx context.Context, at string, header http.Header) (body []byte, err error) {
	pause := 100 * time.Millisecond
	for try := 1; ; try++ {
		body, err = getBodyOnce(ctx, at, header)
		var status *statusError
		if !errors.As(err, &status) || !status.mayPass() || try == tries {
			return body, err
		}
		wait := max(pause, status.after)
		if end, ok := ctx.Deadline(); ok && time.Until(end) <= wait {
			return nil, err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, err
		}
		pause *= 4
	}
}

func getBodyOnce(ctx context.Context, at string, header http.Header) ([]byte, error) {
	// 102 is a final answer of the host agent, though HTTP has it announce another.
	var processing *statusError
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
			if code == http.StatusProcessing {
				processing = &statusError{code: code}
				return processing
			}
			return nil
		},
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	start := time.Now()
	resp, err := newClient().Do(req)
	if processing != nil {
		return nil, processing
	}
	if err != nil {
		return nil, explainNoAnswer(err, at, time.Since(start))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		head, _ := io.ReadAll(io.LimitReader(resp.Body, 80)) // it only words the error
		seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		return nil, &statusError{resp.StatusCode, time.Duration(seconds) * time.Second, strings.TrimSpace(string(head))}
	}
	body, err := readBody(resp.Body)
	if err != nil {
		return nil, explainNoAnswer(err, at, time.Since(start))
	}
	return body, nil
}

func readBody(r io.Reader) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, mostBody+1))
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("its answer broke off after %d bytes", len(body))
	} else if err != nil {
		return nil, err
	}
	if len(body) > mostBody {
		return nil, fmt.Errorf("its answer is longer than %d bytes", mostBody)
	}
	return body, nil
}

// explainNoAnswer words what happened on the way.
func explainNoAnswer(err error, at string, took time.Duration) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err // the URL is said here, once and without Get
	}
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("no answer from %s within %v: is this an Azure VM, asked as root and from its primary address, with no firewall in between?",
			at, took.Round(10*time.Millisecond))
	}
	return fmt.Errorf("%s: %w", at, err)
}

// statusError is an answer other than 200.
type statusError struct {
	code  int
	after time.Duration // Retry-After; 0: none
	body  string        // its beginning
}

func (e *statusError) Error() string {
	text := fmt.Sprintf("it answered %d %s", e.code, http.StatusText(e.code))
	switch e.code {
	case http.StatusUnauthorized, http.StatusForbidden:
		text += " (this VM enforces the Metadata Security Protocol: allow this program in its rules)"
	case http.StatusProcessing:
		text += " (try again)"
	}
	if e.body != "" {
		text += fmt.Sprintf(": %q", e.body)
	}
	return text
}

// mayPass says that the same question may be answered later.
func (e *statusError) mayPass() bool {
	switch e.code {
	case http.StatusProcessing, http.StatusNotFound, http.StatusGone, http.StatusTooManyRequests:
		return true
	}
	return e.code >= 500
}
