// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/docker/go-plugins-helpers/sdk"
	"github.com/sirupsen/logrus"

	"azurevnet/driver"
	"azurevnet/ipamdriver"
)

const (
	manifest = `{"Implements": ["NetworkDriver", "IpamDriver"]}`
	maxBody  = 1 << 20 // bytes; the engine's largest request is a few KB
)

// method answers one call of the engine. body is the JSON of the request.
type method struct {
	call      func(ctx context.Context, body []byte) (any, error)
	bodiless  bool // the request has no body, and is answered before the gate opens
	takesAway bool // the call only takes away: it has less time, and does not wait at the gate
}

// answered makes a method of a driver's function that has a request and an answer.
func answered[Q, A any](call func(context.Context, *Q) (*A, error)) method {
	return method{call: func(ctx context.Context, body []byte) (any, error) {
		request, err := decodeRequest[Q](body)
		if err != nil {
			return nil, err
		}
		return call(ctx, request)
	}}
}

// unanswered makes a method of a driver's function that has a request and no answer.
func unanswered[Q any](call func(context.Context, *Q) error) method {
	return answered(func(ctx context.Context, request *Q) (*struct{}, error) {
		return &struct{}{}, call(ctx, request)
	})
}

// takingAway makes a method of a driver's function that only takes away.
func takingAway[Q any](call func(context.Context, *Q) error) method {
	m := unanswered(call)
	m.takesAway = true
	return m
}

// withoutRequest makes a method of a driver's function that has an answer and no request.
func withoutRequest[A any](call func(context.Context) (*A, error)) method {
	return method{bodiless: true, call: func(ctx context.Context, _ []byte) (any, error) { return call(ctx) }}
}

// decodeRequest decodes a request. It refuses an empty body: if the plugin dies in the middle of a call, the engine
// sends the call again without its body.
func decodeRequest[Q any](body []byte) (*Q, error) {
	request := new(Q)
	if len(body) == 0 {
		return nil, errors.New("the request is empty: the call was lost when the plugin restarted; repeat the command")
	}
	if err := json.Unmarshal(body, request); err != nil {
		return nil, fmt.Errorf("the request is not what the plugin protocol says: %w", err)
	}
	return request, nil
}

// methods has every call of the plugin protocol, by its name.
func methods(n *driver.Driver, i *ipamdriver.Driver) map[string]method {
	return map[string]method{
		"NetworkDriver.GetCapabilities":             withoutRequest(n.GetCapabilities),
		"NetworkDriver.CreateNetwork":               unanswered(n.CreateNetwork),
		"NetworkDriver.DeleteNetwork":               takingAway(n.DeleteNetwork),
		"NetworkDriver.AllocateNetwork":             answered(n.AllocateNetwork),
		"NetworkDriver.FreeNetwork":                 unanswered(n.FreeNetwork),
		"NetworkDriver.CreateEndpoint":              answered(n.CreateEndpoint),
		"NetworkDriver.DeleteEndpoint":              takingAway(n.DeleteEndpoint),
		"NetworkDriver.EndpointOperInfo":            answered(n.EndpointInfo),
		"NetworkDriver.Join":                        answered(n.Join),
		"NetworkDriver.Leave":                       takingAway(n.Leave),
		"NetworkDriver.ProgramExternalConnectivity": unanswered(n.ProgramExternalConnectivity),
		"NetworkDriver.RevokeExternalConnectivity":  takingAway(n.RevokeExternalConnectivity),
		"NetworkDriver.DiscoverNew":                 unanswered(n.DiscoverNew),
		"NetworkDriver.DiscoverDelete":              unanswered(n.DiscoverDelete),
		"IpamDriver.GetCapabilities":                withoutRequest(i.GetCapabilities),
		"IpamDriver.GetDefaultAddressSpaces":        withoutRequest(i.GetDefaultAddressSpaces),
		"IpamDriver.RequestPool":                    answered(i.RequestPool),
		"IpamDriver.ReleasePool":                    takingAway(i.ReleasePool),
		"IpamDriver.RequestAddress":                 answered(i.RequestAddress),
		"IpamDriver.ReleaseAddress":                 takingAway(i.ReleaseAddress),
	}
}

// refuseMaking answers every call that begins a network or an endpoint with the error why. All other calls are served:
// they end or finish what was begun before. An engine from 29 leaves a container without any network if Join or
// ProgramExternalConnectivity fails.
func refuseMaking(all map[string]method, why error) {
	for _, name := range []string{
		"IpamDriver.RequestPool", "IpamDriver.RequestAddress",
		"NetworkDriver.AllocateNetwork", "NetworkDriver.CreateNetwork", "NetworkDriver.CreateEndpoint",
	} {
		all[name] = method{bodiless: true, call: func(context.Context, []byte) (any, error) { return nil, why }}
	}
}

// limits are the times of a call.
type limits struct {
	deadline time.Duration // of the call's context
	grace    time.Duration // after the deadline; if the call still hangs then, the plugin answers with an error
}

// server serves the methods on one socket.
type server struct {
	log      *logrus.Logger
	gate     *gate
	serving  limits // of most calls
	takeAway limits // of calls that only take away

	calls    sync.WaitGroup // in flight
	mu       sync.Mutex     // guards stopping, and keeps calls.Add from running after calls.Wait
	stopping bool
}

// serve answers calls on l until stop is closed. It then waits until the calls in flight have ended, for patience at
// most.
func (s *server) serve(l net.Listener, all map[string]method, stop <-chan struct{}, patience time.Duration) error {
	handler := sdk.NewHandler(manifest)
	for name, m := range all {
		handler.HandleFunc("/"+name, s.handlerOf(name, m))
	}
	failed := make(chan error, 1)
	go func() { failed <- handler.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-stop:
	}
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	l.Close()
	finished := make(chan struct{})
	go func() { s.calls.Wait(); close(finished) }()
	select {
	case <-finished:
	case <-time.After(patience):
		s.log.Warn("stopping with calls in flight: what they leave heals itself")
	}
	return nil
}

// countIn counts a call in. It is false if the server is stopping. The caller counts the call out with calls.Done.
func (s *server) countIn() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.calls.Add(1)
	return true
}

// reply is what a call ended with.
type reply struct {
	answer any
	err    error
}

// handlerOf returns the HTTP handler of a method. It reads the request, runs the method, logs one line, and writes the
// answer.
func (s *server) handlerOf(name string, m method) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !s.countIn() {
			sdk.EncodeResponse(w, refusal(errors.New("the plugin is stopping")), true)
			return
		}
		defer s.calls.Done()
		start := time.Now()
		_ = http.NewResponseController(w).SetReadDeadline(start.Add(s.limitsOf(m).deadline))
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		var out reply
		if err != nil {
			out.err = fmt.Errorf("read the request: %w", err)
		} else {
			out = s.callMethod(name, m, body)
		}
		entry := s.log.WithFields(logrus.Fields{"method": name, "ms": time.Since(start).Milliseconds()})
		if s.log.IsLevelEnabled(logrus.DebugLevel) {
			answer, _ := json.Marshal(out.answer)
			entry = entry.WithFields(logrus.Fields{"request": string(body), "answer": string(answer)})
		} else {
			entry = entry.WithFields(requestFields(body))
		}
		if out.err != nil {
			entry.WithError(out.err).Error("failed")
			sdk.EncodeResponse(w, refusal(out.err), true)
			return
		}
		entry.Info("done")
		sdk.EncodeResponse(w, out.answer, false)
	}
}

// refusal returns an error as the plugin protocol has errors.
func refusal(err error) any { return struct{ Err string }{err.Error()} }

// limitsOf returns the times of a method.
func (s *server) limitsOf(m method) limits {
	if m.takesAway {
		return s.takeAway
	}
	return s.serving
}

// callMethod calls the method with a deadline. If the call hangs or panics, callMethod answers with an error in its
// place.
func (s *server) callMethod(name string, m method, body []byte) reply {
	l := s.limitsOf(m)
	// The request's context is not used: it ends when the engine dies, and a rollback must then go on.
	ctx, cancel := context.WithTimeout(context.Background(), l.deadline)
	result := make(chan reply, 1)
	go func() {
		defer cancel()
		defer func() {
			if p := recover(); p != nil {
				s.log.WithFields(logrus.Fields{"method": name, "stack": string(debug.Stack())}).Errorf("panic: %v", p)
				result <- reply{err: fmt.Errorf("%s: internal error: %v", name, p)}
			}
		}()
		if !m.bodiless && !m.takesAway {
			if err := s.gate.wait(ctx); err != nil {
				result <- reply{err: err}
				return
			}
		}
		answer, err := m.call(ctx, body)
		result <- reply{answer, err}
	}()
	hung := time.NewTimer(l.deadline + l.grace)
	defer hung.Stop()
	select {
	case out := <-result:
		return out
	case <-hung.C:
		return reply{err: fmt.Errorf("%s: no answer within %v: something on this host hangs; azure-vnet-plugin status may tell", name, l.deadline+l.grace)}
	}
}

// requestFields returns what a line of the log says of a request.
func requestFields(body []byte) logrus.Fields {
	var about struct {
		NetworkID, EndpointID, PoolID, Pool, Address string
		Interface                                    struct{ Address string }
	}
	fields := logrus.Fields{}
	if json.Unmarshal(body, &about) != nil {
		return fields
	}
	for key, value := range map[string]string{
		"network": shortID(about.NetworkID), "endpoint": shortID(about.EndpointID), "pool": about.PoolID + about.Pool,
		"address": about.Address + about.Interface.Address,
	} {
		if value != "" {
			fields[key] = value[:min(len(value), 80)]
		}
	}
	return fields
}

// shortID returns the first 12 characters of an id, as docker shows it.
func shortID(id string) string { return id[:min(len(id), 12)] }
