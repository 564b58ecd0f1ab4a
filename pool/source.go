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
	imdsOldAPI    = "2019-06-01" // an older host answers 400 to the version in imdsURL, and knows this one

	mostBody = 1 << 20 // bytes; 256 addresses are 15 KB
	tries    = 3       // how often one question is asked at most
)

// source is one place that tells this VM's addresses.
type source struct {
	name  string // in leases.json and in messages
	fetch func(context.Context) ([]byte, error)
	parse func([]byte) (document, error)
}

// sourcesOf returns the sources of a setting, in the order in which they are asked.
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

// wireServerSource returns the host agent (WireServer) as a source. queryURL may be empty.
func wireServerSource(queryURL string) source {
	if queryURL == "" {
		queryURL = wireServerURL
	}
	return source{"wireserver", func(ctx context.Context) ([]byte, error) { return getBody(ctx, queryURL, nil) }, parseXML}
}

// imdsSource returns the Instance Metadata Service as a source. queryURL may be empty.
func imdsSource(queryURL string) source {
	if queryURL == "" {
		queryURL = imdsURL
	}
	header := http.Header{"Metadata": {"true"}}
	return source{"imds", func(ctx context.Context) ([]byte, error) {
		body, err := getBody(ctx, queryURL, header)
		var status *statusError
		if errors.As(err, &status) && status.code == http.StatusBadRequest {
			return getBody(ctx, olderAPI(queryURL), header)
		}
		return body, err
	}, parseIMDS}
}

// olderAPI returns the URL of IMDS with the older API version.
func olderAPI(queryURL string) string {
	u, err := url.Parse(queryURL)
	if err != nil {
		return queryURL
	}
	q := u.Query()
	q.Set("api-version", imdsOldAPI)
	u.RawQuery = q.Encode()
	return u.String()
}

// fileSource returns a file as a source.
func fileSource(path string) source {
	return source{path, func(context.Context) ([]byte, error) {
		f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // without O_NONBLOCK, a FIFO would keep all calls waiting
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

// newClient returns an HTTP client that uses no proxy and follows no redirect. The addresses of both services are link
// local, so a proxy or another server would answer about another machine.
func newClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:        (&net.Dialer{}).DialContext,
			DisableKeepAlives:  true, // a process asks seldom, and often ends after it
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// getBody asks until an answer comes. It gives up if the refusal is final, after 3 tries, or if ctx would be done
// before the next try.
func getBody(ctx context.Context, queryURL string, header http.Header) (body []byte, err error) {
	pause := 100 * time.Millisecond
	for try := 1; ; try++ {
		body, err = getBodyOnce(ctx, queryURL, header)
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

// getBodyOnce asks once.
func getBodyOnce(ctx context.Context, queryURL string, header http.Header) ([]byte, error) {
	// The host agent sends 102 as its last answer. In HTTP another answer follows it, and the client would wait for it.
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
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, queryURL, nil)
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
		return nil, explainNoAnswer(err, queryURL, time.Since(start))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		head, _ := io.ReadAll(io.LimitReader(resp.Body, 80)) // it is for the error only
		seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		return nil, &statusError{resp.StatusCode, time.Duration(seconds) * time.Second, strings.TrimSpace(string(head))}
	}
	body, err := readBody(resp.Body)
	if err != nil {
		return nil, explainNoAnswer(err, queryURL, time.Since(start))
	}
	return body, nil
}

// readBody reads an answer of at most 1 MiB.
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

// explainNoAnswer returns the error of a request without an answer.
func explainNoAnswer(err error, queryURL string, took time.Duration) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err // the URL is said here, once and without Get
	}
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("no answer from %s within %v: is this an Azure VM, asked as root and from its primary address, with no firewall in between?",
			queryURL, took.Round(10*time.Millisecond))
	}
	return fmt.Errorf("%s: %w", queryURL, err)
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

// mayPass reports whether the same question may be answered later.
func (e *statusError) mayPass() bool {
	switch e.code {
	case http.StatusProcessing, http.StatusNotFound, http.StatusGone, http.StatusTooManyRequests:
		return true
	}
	return e.code >= 500
}
