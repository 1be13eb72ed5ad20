package gate

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// maxLogged is how many requests of members are kept, of all meshes of the gate, and
// of origins as many again while somebody asks: with paths of maxLoggedPath bytes each
// some 0.6 MB together.
const (
	maxLogged     = 512
	maxLoggedPath = 256
	// askedFor is how long one question keeps the requests of origins coming.
	askedFor = time.Minute
)

// accessLog is the last requests of meshes. Its methods may be called concurrently.
type accessLog struct {
	asked atomic.Int64 // when last, Unix time in ns

	mu      sync.Mutex
	seq     int64
	members ring
	origins ring
}

// ring has the newest of what was put into it.
type ring struct {
	lines []logged
	next  int // where the oldest is, when it is full
}

type logged struct {
	key string // of the entry
	intercept.Request
}

func (r *ring) put(l logged) {
	if len(r.lines) < maxLogged {
		r.lines = append(r.lines, l)
		return
	}
	r.lines[r.next] = l
	r.next = (r.next + 1) % maxLogged
}

// wants tells whether a request of m, nil for the origin's, is to be logged.
func (l *accessLog) wants(m *member) bool {
	return m != nil || time.Now().UnixNano()-l.asked.Load() < int64(askedFor)
}

func (l *accessLog) put(key string, r intercept.Request) {
	r.Path = strings.ToValidUTF8(r.Path[:min(len(r.Path), maxLoggedPath)], "?")
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq++
	r.Seq = l.seq
	if r.Session != "" {
		l.members.put(logged{key, r})
	} else {
		l.origins.put(logged{key, r})
	}
}

// since is what came after a request, of one entry, the newest last.
func (l *accessLog) since(key string, after int64) []intercept.Request {
	l.asked.Store(time.Now().UnixNano())
	l.mu.Lock()
	defer l.mu.Unlock()
	all := []intercept.Request{}
	for _, r := range []*ring{&l.members, &l.origins} {
		for _, x := range r.lines {
			if x.key == key && x.Seq > after {
				all = append(all, x.Request)
			}
		}
	}
	slices.SortFunc(all, func(a, b intercept.Request) int { return int(a.Seq - b.Seq) })
	return all
}

// handleRequests answers with the access log of a mesh.
func (g *Gate) handleRequests(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	after := int64(0)
	if text := q.Get("after"); text != "" {
		var err error
		if after, err = strconv.ParseInt(text, 10, 64); err != nil {
			http.Error(w, "after: "+err.Error(), http.StatusBadRequest)
			return
		}
	}
	answer(w, g.requests.since(strings.TrimSuffix(q.Get("key"), entrySuffix), after))
}

// wantsLog tells whether log would keep a request of m, nil for the origin's: where
// it would not, none need be made.
func (c *meshConn) wantsLog(m *member) bool { return c.gate.requests.wants(m) }

// log keeps a request, with its time and duration, for who asks.
func (c *meshConn) log(r intercept.Request) {
	sp := c.route.spec.Load()
	r.Port, r.Client = sp.Port, c.from
	c.gate.requests.put(sp.key, r)
}
