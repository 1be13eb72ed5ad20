package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/version"
)

const (
	// maxBody bounds a request, in bytes: an environment (maxEnv) and options.
	maxBody = 1 << 20
	// lineTimeout is how long a reader of a stream may not read.
	lineTimeout = 10 * time.Second
)

// server answers the API on a listener.
type server struct {
	sup   *supervisor
	cfg   Config
	http  *http.Server
	close context.CancelFunc // ends the streams
}

// newServer makes a server; ctx is the parent of every request's.
func newServer(ctx context.Context, cfg Config, sup *supervisor, connContext func(context.Context, net.Conn) context.Context) *server {
	ctx, cancel := context.WithCancel(ctx)
	s := &server{sup: sup, cfg: cfg, close: cancel}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathVersion, s.version)
	mux.HandleFunc("GET "+api.PathSessions, s.sessions)
	mux.HandleFunc("GET "+api.PathWatch, s.watch)
	mux.HandleFunc("POST "+api.PathConnect, s.connect)
	mux.HandleFunc("POST "+api.PathDisconnect, s.disconnect)
	mux.HandleFunc("POST "+api.PathPing, s.ping)
	mux.HandleFunc("POST "+api.PathPeers, s.peers)
	mux.HandleFunc("POST "+api.PathPeerAdd, s.peerAdd)
	mux.HandleFunc("POST "+api.PathPeerRemove, s.peerRemove)
	mux.HandleFunc("POST "+api.PathIntercept, s.intercept)
	mux.HandleFunc("POST "+api.PathLeave, s.leave)
	mux.HandleFunc("GET "+api.PathIntercepts, s.intercepts)
	mux.HandleFunc("GET "+api.PathLogs, s.logs)
	mux.HandleFunc("POST "+api.PathFacts, s.facts)
	s.http = &http.Server{
		Handler:           s.guard(mux),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       connContext,
		ErrorLog:          log.New(io.Discard, "", 0), // what a client did wrong is told to him
	}
	return s
}

// serve answers until shutdown.
func (s *server) serve(l net.Listener) error {
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the API: %w", err)
	}
	return nil
}

// shutdown lets streams end and requests finish, for at most d.
func (s *server) shutdown(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	stop := time.AfterFunc(d/2, s.close)
	defer stop.Stop()
	s.http.Shutdown(ctx)
	s.close()
	s.http.Close()
}

// guard lets through what a program of an entitled user sent, and no browser:
// a web page can make one send requests to places that the page cannot reach,
// but it cannot choose Host, nor leave out Origin or the Sec-Fetch headers.
func (s *server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set(api.HeaderVersion, version.Version)
		h.Set("Content-Security-Policy", "default-src 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		browser := r.Host != api.Host
		for _, name := range []string{"Origin", "Referer", "Sec-Fetch-Site", "Sec-Fetch-Mode"} {
			browser = browser || len(r.Header.Values(name)) > 0
		}
		if browser {
			refuse(w, &api.Error{Code: api.CodeDenied, Message: "a request that a browser could have made is refused (Host must be " + api.Host + ", without Origin and Referer)"})
			return
		}
		who, ok := callerOf(r.Context())
		if !ok {
			refuse(w, unidentified(errors.New("no credentials on the connection")))
			return
		}
		if who.err != nil {
			refuse(w, who.err)
			return
		}
		if r.Method == http.MethodPost {
			if kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); kind != "application/json" {
				refuse(w, &api.Error{Code: api.CodeUsage, Message: "the request's Content-Type is not application/json"})
				return
			}
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		next.ServeHTTP(w, r)
	})
}

// refuse answers with an error.
func refuse(w http.ResponseWriter, err error) {
	e := asAPI(err)
	status := http.StatusInternalServerError
	switch e.Code {
	case api.CodeUsage:
		status = http.StatusBadRequest
	case api.CodeDenied:
		status = http.StatusForbidden
	case api.CodeNotFound:
		status = http.StatusNotFound
	case api.CodeExists, api.CodeConflict:
		status = http.StatusConflict
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(e)
}

// answer sends one value.
func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		slog.Debug("answering a request", "error", err)
	}
}

// read decodes a request's body, in which unknown fields are errors: an older
// daemon must not do half of what a newer client asks.
func read(r *http.Request, into any) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return &api.Error{Code: api.CodeUsage, Message: "reading the request: " + err.Error()}
	}
	return nil
}

// stream writes lines, each flushed. After an error it writes no more.
type stream struct {
	w   http.ResponseWriter
	ctl *http.ResponseController
	err error
}

func newStream(w http.ResponseWriter) *stream {
	w.Header().Set("Content-Type", "application/x-ndjson")
	st := &stream{w: w, ctl: http.NewResponseController(w)}
	// The request was read whole; a stream may last as long as it likes.
	st.ctl.SetReadDeadline(time.Time{})
	st.err = st.ctl.Flush()
	return st
}

func (st *stream) line(l api.Line) error {
	if st.err != nil {
		return st.err
	}
	st.ctl.SetWriteDeadline(time.Now().Add(lineTimeout))
	if st.err = json.NewEncoder(st.w).Encode(l); st.err == nil {
		st.err = st.ctl.Flush()
	}
	return st.err
}

func (st *stream) event(s api.Session) error { return st.line(api.Line{Event: &api.Event{Session: s}}) }

// end writes the last line.
func (st *stream) end(err error) {
	if err != nil {
		st.line(api.Line{Error: asAPI(err)})
		return
	}
	st.line(api.Line{End: true})
}

// Write makes plain text of the stream, for logs.
func (st *stream) Write(p []byte) (int, error) {
	st.ctl.SetWriteDeadline(time.Now().Add(lineTimeout))
	n, err := st.w.Write(p)
	if err == nil {
		err = st.ctl.Flush()
	}
	return n, err
}
