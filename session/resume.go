package session

import (
	"github.com/culvert-dev/culvert/daemon/api"
)

// resume takes over what the process before this one had begun: what was active
// goes on, what was not is undone.
func (x *intercepts) resume(list []saved) {
	for _, one := range list {
		i := &intercepted{saved: one, state: api.InterceptActive}
		x.mu.Lock()
		x.kept = true
		x.all[i.ID] = i
		x.mu.Unlock()
		if !i.Active {
			x.begin(i, x.undoLoop)
			continue
		}
		if err := x.serve(i); err != nil { // the tunnel is closed: this process ends
			x.session.log.Warn("taking an intercept up again", "err", err)
		}
		if i.Request.Kind != api.KindExpose {
			x.begin(i, x.keep)
		}
	}
}
