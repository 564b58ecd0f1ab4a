package vnetsim

import "time"

type engine struct{ exited chan struct{} }

const cgroupTimeout = 10 * time.Second
