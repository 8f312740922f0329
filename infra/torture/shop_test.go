//go:build torture && linux

package torture_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// replica is one process that serves HTTP.
type replica struct {
	url     string
	avoided atomic.Int64 // until then, in Unix nanoseconds, others are asked first
}

// avoid is for a replica that is slow to answer or away.
func (r *replica) avoid() { r.avoided.Store(time.Now().Add(time.Second).UnixNano()) }

// replicas are those of one service, asked in turn.
type replicas struct {
	all  []*replica
	next atomic.Uint32
}

// pick is the next one that is not tried yet, or nil.
func (s *replicas) pick(tried map[*replica]bool) (picked *replica) {
	now := time.Now().UnixNano()
	for range s.all {
		r := s.all[s.next.Add(1)%uint32(len(s.all))]
		switch {
		case tried[r]:
		case r.avoided.Load() <= now:
			return r
		default:
			picked = r
		}
	}
	return picked
}

// transport speaks to the programs. An answer may be long in coming: the other side may be paused.
func transport(answer time.Duration) *http.Transport {
	return &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 500 * time.Millisecond}).DialContext,
		MaxIdleConnsPerHost: 256, IdleConnTimeout: 30 * time.Second, ResponseHeaderTimeout: answer,
		DisableCompression: true,
	}
}

// proxyPatience is longer than a program takes to answer, if it is to answer at all.
const proxyPatience = 12 * time.Second

// proxy is the one origin of the shop, as it is in the compose file: POST goes to the service that owns the path,
// everything else to the query service. Only a replica that cannot be connected to has surely not seen a request, so
// only then another one gets it.
type proxy struct {
	services map[string]*replicas // by the first element of the paths of commands; "" is the query service
	to       *http.Transport
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client is gone
	}
	owner := ""
	if r.Method == http.MethodPost {
		owner, _, _ = strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	}
	service := p.services[owner]
	if service == nil {
		service = p.services[""]
	}
	status := http.StatusBadGateway
	for tried := map[*replica]bool{}; ; {
		to := service.pick(tried)
		if to == nil {
			break
		}
		tried[to] = true
		// A body that cannot be had again, empty or not, keeps the transport from trying again by itself.
		req, err := http.NewRequestWithContext(r.Context(), r.Method, to.url+r.URL.RequestURI(),
			struct{ io.Reader }{bytes.NewReader(body)})
		if err != nil {
			break
		}
		req.Header, req.ContentLength = r.Header.Clone(), int64(len(body))
		resp, err := p.to.RoundTrip(req)
		if err == nil {
			answer, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if err != nil {
				break
			}
			for k, v := range resp.Header {
				w.Header()[k] = v
			}
			w.WriteHeader(resp.StatusCode)
			_, _ = w.Write(answer)
			return
		}
		to.avoid()
		var network net.Error
		if errors.As(err, &network) && network.Timeout() {
			status = http.StatusGatewayTimeout
		}
		var dial *net.OpError
		if !errors.As(err, &dial) || dial.Op != "dial" {
			break
		}
	}
	w.Header().Set("Retry-After", "1")
	w.WriteHeader(status)
}
